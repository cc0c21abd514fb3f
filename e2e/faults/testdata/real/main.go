// Command real stands for the real docker in the tests of faults. It tells what it was
// given, and ends as its last argument says.
package main

import (
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	h := fnv.New64a()
	size := 0
	for _, a := range os.Args[1:] {
		io.WriteString(h, a+"\x00")
		size += len(a)
	}
	fmt.Printf("%d arguments of %d bytes, %x\n", len(os.Args), size, h.Sum64())
	h.Reset()
	for _, kv := range os.Environ() {
		io.WriteString(h, kv+"\x00")
	}
	fmt.Printf("%d variables, %x\n", len(os.Environ()), h.Sum64())
	fmt.Printf("user %d %d, group %d %d\n", os.Getuid(), os.Geteuid(), os.Getgid(), os.Getegid())
	fmt.Printf("descriptors%s\n", descriptors())
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit)
	fmt.Printf("largest file %d\n", limit.Cur)
	wd, _ := os.Getwd()
	fmt.Printf("in %s\n", wd)
	in, _ := io.ReadAll(os.Stdin)
	fmt.Printf("input %q\n", in)
	fmt.Fprintln(os.Stderr, "an error of its own")
	if last, ok := strings.CutPrefix(os.Args[len(os.Args)-1], "code-"); ok {
		code, _ := strconv.Atoi(last)
		os.Exit(code)
	}
}

// descriptors are those above the standard ones that came over execve: the runtime's
// own are anonymous inodes.
func descriptors() (all string) {
	for fd := 3; fd < 64; fd++ {
		var st syscall.Stat_t
		if syscall.Fstat(fd, &st) != nil {
			continue
		}
		if target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && strings.HasPrefix(target, "anon_inode:") {
			continue
		}
		all += fmt.Sprintf(" %d(%o)", fd, st.Mode&syscall.S_IFMT)
	}
	return all
}
