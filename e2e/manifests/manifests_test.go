package manifests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goreleaser/goreleaser/v2/pkg/config"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

const arc = "../../runner-image/arc"

// kinds are the types of all manifests that are not values of the chart.
var kinds = map[string]func() any{
	"v1 ConfigMap":                       func() any { return new(corev1.ConfigMap) },
	"v1 ServiceAccount":                  func() any { return new(corev1.ServiceAccount) },
	"apps/v1 DaemonSet":                  func() any { return new(appsv1.DaemonSet) },
	"networking.k8s.io/v1 NetworkPolicy": func() any { return new(networkingv1.NetworkPolicy) },
}

// TestManifests: every YAML file is of a known kind and has no field that Kubernetes does
// not know.
func TestManifests(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(arc, "*.yaml"))
	if err != nil || len(files) < 9 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		if strings.HasPrefix(filepath.Base(file), "values-") {
			continue // TestValues
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for i, document := range bytes.Split(data, []byte("\n---\n")) {
			var head struct{ APIVersion, Kind string }
			if err := yaml.Unmarshal(document, &head); err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			make := kinds[head.APIVersion+" "+head.Kind]
			if make == nil {
				t.Errorf("%s, document %d: what is %s %s?", file, i+1, head.APIVersion, head.Kind)
				continue
			}
			object := make()
			if err := yaml.UnmarshalStrict(document, object); err != nil {
				t.Errorf("%s, document %d: %v", file, i+1, err)
			}
			if d, ok := object.(*appsv1.DaemonSet); ok {
				checkPod(t, file, d.Spec.Template.Spec)
				for name, value := range d.Spec.Selector.MatchLabels {
					if d.Spec.Template.Labels[name] != value {
						t.Errorf("%s: the selector wants %s=%s, which its pods do not have", file, name, value)
					}
				}
			}
			if c, ok := object.(*corev1.ConfigMap); ok && c.Data["daemon.json"] != "" {
				checkDaemon(t, c.Data["daemon.json"])
			}
		}
	}
}

// checkDaemon: daemon.json has the names that dockerd knows (its documentation of
// daemon.json), and no mirror, which the sidecar has as an argument.
func checkDaemon(t *testing.T, text string) {
	t.Helper()
	var d struct {
		Proxies struct {
			HTTP  string `json:"http-proxy"`
			HTTPS string `json:"https-proxy"`
			No    string `json:"no-proxy"`
		} `json:"proxies"`
	}
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&d); err != nil {
		t.Errorf("daemon.json: %v", err)
	}
	if d.Proxies.HTTPS == "" || !strings.Contains(d.Proxies.No, "mirror.example.internal") {
		t.Errorf("the proxies of daemon.json: %+v: the mirror must be reached without one", d.Proxies)
	}
}

// values are what the files set of the chart's values. The names of all its values are
// in chart-values.txt.
type values struct {
	GithubConfigURL    string                 `json:"githubConfigUrl"`
	GithubConfigSecret string                 `json:"githubConfigSecret"`
	ContainerMode      containerMode          `json:"containerMode"`
	Template           corev1.PodTemplateSpec `json:"template"`
}

type containerMode struct {
	Type  string                            `json:"type"`
	Claim *corev1.PersistentVolumeClaimSpec `json:"kubernetesModeWorkVolumeClaim"`
}

// TestValues: the chart knows each value, Kubernetes each field of the template, and the
// pod that comes out of them fits together.
func TestValues(t *testing.T) {
	known := chartValues(t)
	files, err := filepath.Glob(filepath.Join(arc, "values-*.yaml"))
	if err != nil || len(files) < 4 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var keys map[string]json.RawMessage
			var v values
			if err := yaml.Unmarshal(data, &keys); err != nil {
				t.Fatal(err)
			}
			for key := range keys {
				if !slices.Contains(known, key) {
					t.Errorf("the chart has no value %s", key)
				}
			}
			if err := yaml.UnmarshalStrict(data, &v); err != nil {
				t.Fatal(err)
			}
			pod := render(t, v)
			checkPod(t, file, pod)
			checkRunner(t, v, pod)
		})
	}
}

// chartValues are the names in chart-values.txt.
func chartValues(t *testing.T) (names []string) {
	data, err := os.ReadFile("chart-values.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			names = append(names, line)
		}
	}
	return names
}

// render does to a template what the chart does in each mode, for Kubernetes 1.29 or
// later (gha-runner-scale-set 0.14.2, templates/_helpers.tpl). It models pods; names,
// service accounts and GitHub's certificates are left out.
func render(t *testing.T, v values) corev1.PodSpec {
	pod := *v.Template.Spec.DeepCopy()
	if len(pod.Containers) != 1 || pod.Containers[0].Name != "runner" {
		t.Fatalf("the template's containers: %+v", pod.Containers)
	}
	runner := &pod.Containers[0]
	work := corev1.Volume{Name: "work", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}
	mount := func(volume, path string) corev1.VolumeMount { return corev1.VolumeMount{Name: volume, MountPath: path} }
	env := func(name, value string) {
		if !slices.ContainsFunc(runner.Env, func(e corev1.EnvVar) bool { return e.Name == name }) {
			runner.Env = append(runner.Env, corev1.EnvVar{Name: name, Value: value})
		}
	}
	switch v.ContainerMode.Type {
	case "dind":
		always := corev1.ContainerRestartPolicyAlways
		pod.InitContainers = append([]corev1.Container{
			{Name: "init-dind-externals", Image: runner.Image, VolumeMounts: []corev1.VolumeMount{mount("dind-externals", "/home/runner/tmpDir")}},
			{Name: "dind", Image: "docker:dind", RestartPolicy: &always,
				Args:         []string{"dockerd", "--host=unix:///var/run/docker.sock", "--group=$(DOCKER_GROUP_GID)"},
				Env:          []corev1.EnvVar{{Name: "DOCKER_GROUP_GID", Value: "123"}},
				VolumeMounts: []corev1.VolumeMount{mount("work", "/home/runner/_work"), mount("dind-sock", "/var/run"), mount("dind-externals", "/home/runner/externals")}},
		}, pod.InitContainers...)
		env("DOCKER_HOST", "unix:///var/run/docker.sock")
		env("RUNNER_WAIT_FOR_DOCKER_IN_SECONDS", "120")
		runner.VolumeMounts = append(runner.VolumeMounts, mount("work", "/home/runner/_work"), mount("dind-sock", "/var/run"))
		pod.Volumes = append(pod.Volumes, work, corev1.Volume{Name: "dind-sock"}, corev1.Volume{Name: "dind-externals"})
	case "kubernetes":
		if v.ContainerMode.Claim == nil {
			t.Error("the chart wants kubernetesModeWorkVolumeClaim in this mode")
		}
		env("ACTIONS_RUNNER_CONTAINER_HOOKS", "/home/runner/k8s/index.js")
		env("ACTIONS_RUNNER_REQUIRE_JOB_CONTAINER", "true")
		runner.VolumeMounts = append(runner.VolumeMounts, mount("work", "/home/runner/_work"))
		pod.Volumes = append(pod.Volumes, work)
	case "":
	default:
		t.Errorf("the chart has no container mode %q", v.ContainerMode.Type)
	}
	return pod
}

var reference = regexp.MustCompile(`\$\(([A-Za-z_][A-Za-z0-9_]*)\)`)

// checkPod: what an API server would refuse, or what would hang a pod at its start.
func checkPod(t *testing.T, file string, pod corev1.PodSpec) {
	t.Helper()
	volumes := map[string]bool{}
	for _, v := range pod.Volumes {
		if volumes[v.Name] {
			t.Errorf("%s: two volumes %s", file, v.Name)
		}
		volumes[v.Name] = true
	}
	used := map[string]bool{}
	names := map[string]bool{}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if names[c.Name] || c.Image == "" {
			t.Errorf("%s: container %s is there twice, or has no image", file, c.Name)
		}
		names[c.Name] = true
		env, paths := map[string]bool{}, map[string]bool{}
		for _, e := range c.Env {
			if env[e.Name] || (e.Value == "") == (e.ValueFrom == nil) {
				t.Errorf("%s: container %s: variable %s is there twice, or has no value, or two", file, c.Name, e.Name)
			}
			env[e.Name] = true
		}
		texts := slices.Concat(c.Command, c.Args)
		for _, m := range c.VolumeMounts {
			if !volumes[m.Name] {
				t.Errorf("%s: container %s mounts %s, which is no volume", file, c.Name, m.Name)
			}
			if paths[m.MountPath] {
				t.Errorf("%s: container %s mounts two at %s", file, c.Name, m.MountPath)
			}
			used[m.Name], paths[m.MountPath] = true, true
			texts = append(texts, m.SubPathExpr)
		}
		for _, text := range texts {
			for _, m := range reference.FindAllStringSubmatch(text, -1) {
				if !env[m[1]] {
					t.Errorf("%s: container %s has no variable for %s", file, c.Name, text)
				}
			}
		}
	}
	for name := range volumes {
		if !used[name] {
			t.Errorf("%s: nothing mounts %s", file, name)
		}
	}
}

// checkRunner: Tallyman works in the pod.
func checkRunner(t *testing.T, v values, pod corev1.PodSpec) {
	t.Helper()
	runner := pod.Containers[0]
	env := map[string]corev1.EnvVar{}
	for _, e := range runner.Env {
		env[e.Name] = e
	}
	mounts := map[string]corev1.VolumeMount{}
	for _, m := range runner.VolumeMounts {
		mounts[m.MountPath] = m
		// Our folders must not lie below a mount that hides them.
		if strings.HasPrefix("/var/lib/tallyman/run", m.MountPath+"/") && m.MountPath != "/var/lib/tallyman" {
			t.Errorf("%s hides the run folder", m.MountPath)
		}
	}
	if !slices.Equal(runner.Command, []string{"/home/runner/run.sh"}) {
		t.Errorf("the runner starts with %v", runner.Command)
	}
	if v.ContainerMode.Type == "kubernetes" {
		return
	}
	for _, name := range []string{"POD_NAME", "POD_NAMESPACE", "NODE_NAME", "DOCKER_HOST"} {
		if _, ok := env[name]; !ok {
			t.Errorf("the runner has no %s", name)
		}
	}
	host, url := env["DD_AGENT_HOST"], env["DD_DOGSTATSD_URL"]
	switch {
	case host.ValueFrom != nil && host.ValueFrom.FieldRef != nil && host.ValueFrom.FieldRef.FieldPath == "status.hostIP":
	case strings.HasPrefix(url.Value, "unix:///") && mounts[filepath.Dir(strings.TrimPrefix(url.Value, "unix://"))].Name != "":
	default:
		t.Error("the runner does not reach DogStatsD")
	}
	if _, ok := mounts["/var/lib/tallyman"]; !ok {
		t.Error("the state folder is on no volume")
	}
	if m := mounts["/etc/tallyman"]; !m.ReadOnly {
		t.Error("jobs could write the configuration")
	}
	baked := !strings.HasPrefix(runner.Image, "ghcr.io/actions/actions-runner:")
	for variable, script := range map[string]string{"ACTIONS_RUNNER_HOOK_JOB_STARTED": "job-started.sh", "ACTIONS_RUNNER_HOOK_JOB_COMPLETED": "job-completed.sh"} {
		if e, ok := env[variable]; ok == baked || !baked && e.Value != "/opt/tallyman/bin/"+script {
			t.Errorf("%s is %q in an image that is baked: %v", variable, e.Value, baked)
		}
	}
	if !baked {
		for _, path := range []string{"/opt/tallyman", "/usr/local/bin/docker"} {
			if m := mounts[path]; !m.ReadOnly || m.Name != "tallyman" {
				t.Errorf("%s is mounted as %+v", path, m)
			}
		}
	}
}

// TestGoreleaser: goreleaser reads its configuration, and uploads every kind of file that
// packaging/build.sh and desk.sh make.
func TestGoreleaser(t *testing.T) {
	project, err := config.Load("../../.goreleaser.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(project.Before.Hooks, "make packages packages-desk") || project.ProjectName != "tallyman" {
		t.Errorf("%+v", project.Before)
	}
	var globs []string
	for _, f := range project.Release.ExtraFiles {
		globs = append(globs, f.Glob)
	}
	want := []string{"dist/*.deb", "dist/*.rpm", "dist/*.tar.gz", "dist/*.cdx.json", "dist/SHA256SUMS"}
	if fmt.Sprint(globs) != fmt.Sprint(want) {
		t.Errorf("uploads %v, not %v", globs, want)
	}
}
