// Command probe stands for the real docker in the tests of the shim.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// The parent-death signal belongs to the main thread.
func init() { runtime.LockOSThread() }

func main() { os.Exit(probe()) }

func uintptrOf[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }

// probe tells on standard output all that a program can see of how it was started.
func probe() int {
	switch {
	case len(os.Args) == 3 && os.Args[1] == "exit":
		n, _ := strconv.Atoi(os.Args[2])
		return n
	case len(os.Args) == 3 && os.Args[1] == "kill":
		n, _ := strconv.Atoi(os.Args[2])
		// The default action must strike, whatever the Go runtime of the probe does.
		self := os.Getpid()
		syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(n), uintptrOf(&[4]uint64{}), 0, 8, 0, 0)
		syscall.Kill(self, syscall.Signal(n))
		select {}
	}
	fmt.Printf("args %q\n", os.Args)
	env, _ := os.ReadFile("/proc/self/environ")
	fmt.Printf("environ %q\n", env)
	wd, err := os.Readlink("/proc/self/cwd")
	fmt.Printf("cwd %q %v\n", wd, err)
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		for _, field := range []string{"Umask", "PPid", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "CapInh", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp:", "Cpus_allowed:"} {
			if strings.HasPrefix(line, field) {
				fmt.Print(line)
			}
		}
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && !strings.HasPrefix(target, "anon_inode") && !strings.HasPrefix(target, "/proc/") {
			fmt.Printf("fd %s %s\n", fd.Name(), strings.TrimRight(target, "0123456789[]"))
		}
	}
	limits, _ := os.ReadFile("/proc/self/limits")
	fmt.Printf("%s", limits)
	pgid, _ := syscall.Getpgid(0)
	sid, _, _ := syscall.RawSyscall(syscall.SYS_GETSID, 0, 0, 0)
	fmt.Printf("leads group %v session %v\n", pgid == os.Getpid(), int(sid) == os.Getpid())
	prio, _ := syscall.Getpriority(syscall.PRIO_PROCESS, 0)
	var pdeath int32
	syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_GET_PDEATHSIG, uintptrOf(&pdeath), 0)
	fmt.Printf("priority %d parent-death signal %d\n", prio, pdeath)
	return 0
}
