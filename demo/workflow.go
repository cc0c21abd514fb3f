package main

import (
	"embed"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// repos are the repositories of the demo's organisation, as they would be on GitHub.
//
//go:embed all:repos
var repos embed.FS

// job is one job of a workflow file, and the docker commands that its steps hold.
type job struct {
	repository string // acme/shop
	dir        string // its checkout
	workflow   string // the name
	file       string // ci.yml
	name       string // the key of the job
	commands   []string
}

var (
	workflowName  = regexp.MustCompile(`^name: *"?([^"]*)"?$`)
	jobKey        = regexp.MustCompile(`^  ([a-z-]+):$`)
	dockerCommand = regexp.MustCompile(`(?:^| )docker ((?:network |image )?[a-z]+)`)
)

// readJobs reads a workflow file of the demo. It is no YAML reader: it knows the
// layout of these files and one docker command per line, and so finds what must be
// in the account without asking anything of Tallyman.
func readJobs(repository, dir, file string) ([]job, error) {
	data, err := os.ReadFile(filepath.Join(dir, ".github", "workflows", file))
	if err != nil {
		return nil, err
	}
	var (
		jobs     []job
		workflow string
		inJobs   bool
	)
	for line := range strings.Lines(string(data)) {
		line = strings.TrimRight(line, "\n")
		if m := workflowName.FindStringSubmatch(line); m != nil {
			workflow = m[1]
		}
		inJobs = inJobs || line == "jobs:"
		if m := jobKey.FindStringSubmatch(line); m != nil && inJobs {
			jobs = append(jobs, job{repository: repository, dir: dir, workflow: workflow, file: file, name: m[1]})
		}
		if len(jobs) == 0 || strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		if m := dockerCommand.FindStringSubmatch(strings.Replace(line, "run: ", "", 1)); m != nil {
			last := &jobs[len(jobs)-1]
			last.commands = append(last.commands, m[1])
		}
	}
	return jobs, nil
}

// writeRepo writes the files of a repository to dir.
func writeRepo(name, dir string) error {
	files, err := fs.Sub(repos, "repos/"+name)
	if err != nil {
		return err
	}
	return os.CopyFS(dir, files)
}
