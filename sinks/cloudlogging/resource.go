package cloudlogging

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"cloud.google.com/go/compute/metadata"
	"google.golang.org/genproto/googleapis/api/monitoredres"
	"google.golang.org/protobuf/proto"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks"
	"github.com/tallyman-ci/tallyman/sinks/internal/gcp"
)

// The kinds of monitored resources that a runner can be
// (https://cloud.google.com/logging/docs/api/v2/resource-list).
const (
	container = "k8s_container"
	instance  = "gce_instance"
	node      = "generic_node"
)

// detectTimeout bounds what the metadata server may take, all questions together.
const detectTimeout = 3 * time.Second

// resource is what the URL says of the monitored resource. What it leaves open is
// asked of the environment and of the metadata server.
type resource struct {
	kind    string // one of the above, or auto
	project string

	location, cluster, namespace, container string
}

func resourceParams() []sinks.Param {
	return []sinks.Param{
		{Name: "resource", Default: "auto", Doc: "monitored resource: auto, k8s_container, gce_instance or generic_node"},
		{Name: "location", Default: "detected", Doc: "its location, such as europe-west1"},
		{Name: "cluster", Default: "detected", Doc: "the cluster_name of k8s_container"},
		{Name: "namespace", Default: "detected", Doc: "the namespace of generic_node, and where the record names none that of k8s_container"},
		{Name: "container", Default: "CONTAINER_NAME, or runner", Doc: "the container_name of k8s_container"},
	}
}

func parseResource(t *sinks.Target, project string) (resource, error) {
	r := resource{
		kind: t.String("resource", "auto"), project: project,
		location: t.String("location", ""), cluster: t.String("cluster", ""),
		namespace: t.String("namespace", ""), container: t.String("container", ""),
	}
	if known := []string{"auto", container, instance, node}; !slices.Contains(known, r.kind) {
		return r, fmt.Errorf("parameter resource: want %s, not %q", strings.Join(known, ", "), r.kind)
	}
	return r, nil
}

// namespaceFile is what a pod has that mounts a service account's token.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// detect finds out where this process runs. It asks the environment first, because
// the metadata server is not everywhere, and gives up on that after a few seconds.
func (r resource) detect(ctx context.Context) *monitoredres.MonitoredResource {
	ctx, cancel := context.WithTimeout(ctx, detectTimeout)
	defer cancel()
	meta := gcp.Metadata()
	// silent says that the server is not there: the first question that it does not
	// answer in its time is the last one.
	silent := false
	ask := func(given, suffix string) string {
		if given != "" || silent {
			return given
		}
		value, err := meta.GetWithContext(ctx, suffix)
		if err != nil {
			var none metadata.NotDefinedError // it answered, and has no such thing
			silent = !errors.As(err, &none)
			return ""
		}
		return strings.TrimSpace(value)
	}
	host, _ := os.Hostname()
	inPod := os.Getenv("KUBERNETES_SERVICE_HOST") != "" || os.Getenv("POD_NAME") != ""
	if r.kind == container || r.kind == "auto" && inPod {
		cluster := ask(r.cluster, "instance/attributes/cluster-name")
		location := cmp.Or(ask(r.location, "instance/attributes/cluster-location"), lastPart(ask("", "instance/zone")))
		mounted, _ := os.ReadFile(namespaceFile)
		return &monitoredres.MonitoredResource{Type: container, Labels: map[string]string{
			"project_id": r.project, "location": location, "cluster_name": cluster,
			"namespace_name": cmp.Or(r.namespace, os.Getenv("POD_NAMESPACE"), strings.TrimSpace(string(mounted))),
			"pod_name":       cmp.Or(os.Getenv("POD_NAME"), host),
			"container_name": cmp.Or(r.container, os.Getenv("CONTAINER_NAME"), "runner"),
		}}
	}
	if r.kind != node {
		if id := ask("", "instance/id"); id != "" || r.kind == instance {
			return &monitoredres.MonitoredResource{Type: instance, Labels: map[string]string{
				"project_id": r.project, "instance_id": cmp.Or(id, host), "zone": cmp.Or(r.location, lastPart(ask("", "instance/zone"))),
			}}
		}
	}
	return &monitoredres.MonitoredResource{Type: node, Labels: map[string]string{
		"project_id": r.project, "location": cmp.Or(r.location, "global"), "namespace": r.namespace, "node_id": host,
	}}
}

// lastPart is the zone of projects/123/zones/europe-west1-b.
func lastPart(s string) string { return s[strings.LastIndexByte(s, '/')+1:] }

// ofRecord is the resource of a record that was made in another pod than this one,
// as for the journals of dead runners that a node's agent delivers, or nil.
func ofRecord(here *monitoredres.MonitoredResource, h *record.Host) *monitoredres.MonitoredResource {
	if here.GetType() != container || h == nil || h.Pod == "" {
		return nil
	}
	if h.Pod == here.Labels["pod_name"] && (h.Namespace == "" || h.Namespace == here.Labels["namespace_name"]) {
		return nil
	}
	other := proto.CloneOf(here)
	other.Labels["pod_name"] = h.Pod
	if h.Namespace != "" {
		other.Labels["namespace_name"] = h.Namespace
	}
	return other
}
