// Command leanbuild builds the docker shim with a Go runtime that starts fewer
// things: no monitor thread, no garbage collector, no look at cgroup files, no
// signal handlers but those for its own faults.
//
//	go run ./internal/leanbuild -o bin/docker-shim ./cmd/docker-shim
//
// A Go program spends a millisecond and more, and starts three threads, before its
// main function runs; the shim's whole work after that takes a tenth of it, in one
// goroutine, and ends in execve(2). All of that start is added to every docker
// command. Leaving it out halves what the shim adds (`make bench` prints it), and
// makes the shim more transparent: with one thread, execve has no threads to kill,
// and with no handlers it changes no signal's disposition.
//
// It is done with `go build -overlay`, which replaces source files for one build:
// the toolchain on disk stays as it is, and no line of Go's source lies in this
// repository. Each edit names the text it replaces. Where a Go version does not have
// that text exactly once, nothing is edited and the shim is built with the runtime as
// it is, which is as correct and slower; leanbuild says so.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// edit replaces one text in one file of the standard library.
type edit struct {
	file     string // below GOROOT/src
	old, new string
	why      string
}

var edits = []edit{
	{
		file: "runtime/proc.go",
		old:  "\tif haveSysmon {\n\t\tsystemstack(func() {\n\t\t\tnewm(sysmon, nil, -1)\n\t\t})\n\t}\n",
		new:  "",
		why:  "the monitor thread serves the scheduler of many goroutines; the shim has one",
	},
	{
		file: "runtime/proc.go",
		old:  "\tgcenable()\n\tdefaultGOMAXPROCSUpdateEnable() // don't STW before runtime initialized.\n",
		new:  "",
		why:  "the collector's goroutines start threads; until gcenable runs, collection is off",
	},
	{
		file: "runtime/proc.go",
		old:  "\tgo forcegchelper()\n",
		new:  "",
		why:  "as above",
	},
	{
		file: "runtime/proc.go",
		old:  "\t\tprocs = defaultGOMAXPROCS(numCPUStartup)\n",
		new:  "\t\tprocs = 1\n",
		why:  "the runtime prepares memory for each processor of the node",
	},
	{
		file: "runtime/proc.go",
		old:  "\tsecure()\n\tcheckfds()\n",
		new:  "\tsecure()\n",
		why:  "the runtime opens /dev/null in the place of closed standard descriptors, and the command that is executed would get them",
	},
	{
		file: "runtime/cgroup_linux.go",
		old:  "func defaultGOMAXPROCSInit() {\n",
		new:  "func defaultGOMAXPROCSInit() {\n\tif true {\n\t\treturn\n\t}\n",
		why:  "one goroutine needs no processor limit; the look reads four files",
	},
	{
		file: "runtime/mprof.go",
		old:  "var MemProfileRate int = 512 * 1024\n",
		new:  "var MemProfileRate int = 0\n",
		why:  "the first allocation is sampled with a stack trace before the runtime knows that nobody asks for a profile",
	},
	{
		file: "internal/cpu/cpu_x86.go",
		old:  "func doinit() {\n",
		new:  "func doinit() {\n\tif true {\n\t\treturn\n\t}\n",
		why:  "each CPUID instruction leaves a virtual machine, which takes tens of microseconds; without its answers the code for any amd64 processor is used",
	},
	{
		file: "runtime/signal_unix.go",
		old:  "\tfor i := uint32(0); i < _NSIG; i++ {\n\t\tt := &sigtable[i]\n\t\tif t.flags == 0 || t.flags&_SigDefault != 0 {\n",
		new:  "\tfor i := uint32(0); i < _NSIG; i++ {\n\t\tt := &sigtable[i]\n\t\tif i != _SIGSEGV && i != _SIGBUS && i != _SIGFPE || getsig(i) == _SIG_IGN {\n\t\t\tcontinue\n\t\t}\n\t\tif t.flags == 0 || t.flags&_SigDefault != 0 {\n",
		why:  "a handler turns an ignored signal into a default one in the command that is executed; faults stay panics, so that a defect in the recording code can be recovered",
	},
	{
		file: "runtime/signal_unix.go",
		old:  "func minitSignalMask() {\n",
		new:  "func minitSignalMask() {\n\tif true {\n\t\treturn\n\t}\n",
		why:  "the runtime unblocks the signals that it handles, and the command that is executed would find them unblocked, or lose one that was pending",
	},
}

func main() {
	out := flag.String("o", "", "file to write")
	ldflags := flag.String("ldflags", "-s -w", "passed to go build")
	require := flag.Bool("require", false, "fail where the lean runtime cannot be built, instead of building with the usual one")
	flag.Parse()
	if err := run(*out, *ldflags, *require, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "leanbuild:", err)
		os.Exit(1)
	}
}

func run(out, ldflags string, require bool, packages []string) error {
	if out == "" || len(packages) != 1 {
		return fmt.Errorf("usage: leanbuild -o FILE PACKAGE")
	}
	dir, err := os.MkdirTemp("", "leanbuild")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	args := []string{"build", "-trimpath", "-o", out}
	overlay, err := writeOverlay(dir)
	switch {
	case err == nil:
		args = append(args, "-overlay", overlay)
		ldflags += " -X main.lean=true"
	case require:
		return err
	default:
		fmt.Fprintf(os.Stderr, "leanbuild: %v: building with the usual runtime; the shim is as correct, and slower by about a millisecond per call\n", err)
	}
	cmd := exec.Command("go", append(append(args, "-ldflags", ldflags), packages...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// writeOverlay writes the edited files and the file that names them for go build.
func writeOverlay(dir string) (string, error) {
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find the Go toolchain: %w", err)
	}
	src := filepath.Join(strings.TrimSpace(string(goroot)), "src")
	edited := map[string]string{}
	for _, e := range edits {
		path := filepath.Join(src, e.file)
		if edited[path] == "" {
			source, err := os.ReadFile(path)
			if err != nil {
				return "", fmt.Errorf("read the source of the standard library: %w", err)
			}
			edited[path] = string(source)
		}
		if n := strings.Count(edited[path], e.old); n != 1 {
			return "", fmt.Errorf("this Go version has a text to replace in %s %d times instead of once (%s)", e.file, n, e.why)
		}
		edited[path] = strings.Replace(edited[path], e.old, e.new, 1)
	}
	replace := map[string]string{}
	for path, source := range edited {
		replace[path] = filepath.Join(dir, strings.ReplaceAll(strings.TrimPrefix(path, src+"/"), "/", "_"))
		if err := os.WriteFile(replace[path], []byte(source), 0o644); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, b, 0o644)
}
