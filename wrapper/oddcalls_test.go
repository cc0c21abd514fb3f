package wrapper

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/internal/faults"
)

// rawRecords reads the append file as it is.
func (in installation) rawRecords(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("%s/spool/%d.jsonl", in.run, os.Getuid()))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return b
}

// TestRecordOfAHugeCommandLine: the tool gets all of it, TestTransparency says; the
// record says that it holds a part.
func TestRecordOfAHugeCommandLine(t *testing.T) {
	faults.Case(t, "SH-19")
	eachBuild(t, func(t *testing.T, in installation) {
		args := []string{"launch", "arg=rmi"}
		for i := range 15000 {
			args = append(args, fmt.Sprintf("arg=registry.example/team/app-%d:1", i))
		}
		cmd := exec.Command(shims.dir+"/probe", append(args, "fill=2000000", "env=GITHUB_WORKFLOW="+strings.Repeat("w", 60000), "--", in.shim)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if n := len(in.rawRecords(t)); n > maxRecord {
			t.Errorf("the record has %d bytes", n)
		}
		all := in.records(t)
		if len(all) != 1 || !all[0].Invocation.Truncated || all[0].Invocation.Argc < 15000 || all[0].Invocation.Command != "rmi" || len(all[0].Invocation.Images) == 0 {
			t.Errorf("%.500s", in.rawRecords(t))
		}
	})
}

// TestRecordOfInvalidText: bytes that are no text may come in every argument and
// variable. The record is text all the same, and one line that a terminal may show.
func TestRecordOfInvalidText(t *testing.T) {
	faults.Case(t, "SH-21")
	eachBuild(t, func(t *testing.T, in installation) {
		const odd = "\xff\xfe\x80\xc3(\xed\xa0\x80\x1b[2J\r\u2028\u009b"
		cmd := exec.Command(in.shim, "run", odd, "--"+odd, "alpine"+odd, "alpine:3", odd)
		for _, name := range []string{"GITHUB_REPOSITORY", "GITHUB_WORKFLOW", "GITHUB_JOB", "GITHUB_ACTION", "RUNNER_NAME", "POD_NAME", "DOCKER_HOST"} {
			cmd.Env = append(cmd.Env, name+"=a"+odd+"z")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b := in.rawRecords(t)
		if !utf8.Valid(b) || bytes.Count(b, []byte("\n")) != 1 || bytes.ContainsAny(b[:len(b)-1], "\x00\x01\x1b\r\u2028\u009b") {
			t.Errorf("%q", b)
		}
		all := in.records(t) // decoded strictly
		if len(all) != 1 || all[0].CI == nil || !strings.HasPrefix(all[0].CI.Workflow, "a\ufffd") || !strings.HasSuffix(all[0].CI.Workflow, "z") {
			t.Errorf("%q", b)
		}
	})
}

// TestCallByAPlugin: docker tells its plugins how to call it, and they do. Such a call
// is none of the job's own.
func TestCallByAPlugin(t *testing.T) {
	faults.Case(t, "SH-55")
	eachBuild(t, func(t *testing.T, in installation) {
		// As the docker CLI: the plugin is a child with this variable.
		script := "#!/bin/sh\n" +
			"case $1 in\n" +
			"buildx) DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND=" + in.shim + " sh -c '\"$DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND\" context inspect; exit $?'; exit $? ;;\n" +
			"context) exit 3 ;;\n" +
			"esac\n"
		if err := os.WriteFile(in.real, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(in.shim, "buildx", "build", ".")
		cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != 3 {
			t.Errorf("exit code %d", code)
		}
		all := in.records(t)
		if len(all) != 2 {
			t.Fatalf("%d records", len(all))
		}
		outer, inner := all[0].Invocation, all[1].Invocation
		if outer.Nested || outer.Command != "buildx build" || !inner.Nested || inner.Command != "context inspect" || inner.PID == outer.PID {
			t.Errorf("%+v and %+v", outer, inner)
		}
	})
}

// TestSpoolOnNFS: no kernel here has NFS for certain, so strace(1) changes the type in
// the kernel's answer to statfs(2), which is what the shim decides by.
func TestSpoolOnNFS(t *testing.T) {
	faults.Case(t, "SH-50")
	st := newStage(t)
	under := func(inject string) {
		t.Helper()
		trace := st.dir + "/trace"
		cmd := exec.Command("strace", "-qq", "-o", trace, "-e", "trace=statfs", "-e", "inject=statfs:"+inject, st.docker, "exit", "7")
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == 1 {
			faults.CannotRun(t, fmt.Sprintf("needs strace 5.11 and ptrace: %v %s (apt-get install strace)", err, out))
		}
		if cmd.ProcessState.ExitCode() != 7 || len(out) > 0 {
			t.Errorf("%v: %s", err, out)
		}
		if b, _ := os.ReadFile(trace); !bytes.Contains(b, []byte("INJECTED")) && !bytes.Contains(b, []byte("DELAYED")) {
			t.Fatalf("the shim did not ask for the type: %s", b)
		}
	}
	files := func() int {
		t.Helper()
		names, err := filepath.Glob(st.dir + "/run*/spool/*")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	const nfs = "poke_exit=@arg2=6969000000000000"
	for _, w := range []way{lean, usual} {
		st.place(t, w, "probe")
		under(nfs)
		if n := files(); n != 0 {
			t.Errorf("%s: %d files were made on NFS", w.name, n)
		}
	}
	st.place(t, lean, "probe")
	under("delay_enter=1") // that it is the type: nothing else keeps the file from being made
	if files() == 0 {
		t.Error("no file was made on tmpfs")
	}
	for _, w := range []way{leanAgent, usualAgent} {
		st.place(t, w, "probe")
		before := st.acked.Load()
		cmd := exec.Command(st.docker, "exit", "7")
		cmd.Run()
		if st.acked.Load() != before+1 || cmd.ProcessState.ExitCode() != 7 {
			t.Errorf("%s: the socket did not take the record: %v", w.name, cmd.ProcessState)
		}
	}
}
