// Command probe stands for the real docker in the tests of the shim, and starts it in
// odd ways:
//
//	probe [ARGS...]                        tell all that is seen of the start, as JSON
//	probe exit N | kill N | tty            end with a code, by a signal, or talk to a terminal
//	probe launch SETUP... -- PATH [ARGS]   set something up, see launch.go, and become PATH
//
// The state goes to standard output, or to the file that PROBE_OUT names.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/tallyman-ci/tallyman/internal/probe"
)

// lean is set by leanbuild: there is one thread then, and locking would start another.
var lean string

// Many of the properties belong to the main thread.
func init() {
	if lean == "" {
		runtime.LockOSThread()
	}
}

func main() { os.Exit(run()) }

func run() int {
	if len(os.Args) >= 3 {
		n, _ := strconv.Atoi(os.Args[2])
		switch os.Args[1] {
		case "exit":
			return n
		case "kill":
			killSelf(n)
		case "launch":
			return launch(os.Args[2:])
		}
	}
	if len(os.Args) == 2 && os.Args[1] == "tty" {
		return talk()
	}
	return tell(probe.Collect())
}

func tell(s probe.State) int {
	b, err := json.Marshal(s)
	if err == nil {
		if path := os.Getenv("PROBE_OUT"); path != "" {
			err = os.WriteFile(path, b, 0o666)
		} else {
			_, err = os.Stdout.Write(append(b, '\n'))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		return 99
	}
	return 0
}

// killSelf ends the process by signal n and its default action, whatever the runtime does
// with it.
func killSelf(n int) {
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(n), uintptr(unsafe.Pointer(&[4]uint64{})), 0, 8, 0, 0)
	set := uint64(1) << (n - 1)
	const unblock = 1
	syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, unblock, uintptr(unsafe.Pointer(&set)), 0, 8, 0, 0)
	syscall.Kill(syscall.Getpid(), syscall.Signal(n))
	// The default action of a few signals is to do nothing.
	os.Exit(0)
}

// talk answers each line on the terminal with the state, until "bye".
func talk() int {
	fmt.Println("ready", os.Getpid())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if strings.TrimSpace(lines.Text()) == "bye" {
			return 5
		}
		b, _ := json.Marshal(probe.Collect())
		fmt.Printf("state %s\n", b)
	}
	return 6
}
