// Package procfs reads what the kernel says of a process in /proc/<pid>/stat.
package procfs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Stat is a part of /proc/<pid>/stat (proc_pid_stat(5)).
type Stat struct {
	Name   string // of the program, 15 bytes at most
	State  byte   // Z and X are dead
	Parent int    // 0 where it has none in this pid namespace
	Start  uint64 // since boot, suspended time included, in ticks of 10 ms (USER_HZ)
}

// Read reads the stat of a process of this pid namespace. It fails where there is none.
func Read(pid int) (Stat, error) { return ReadIn("/proc/" + strconv.Itoa(pid)) }

// ReadIn reads the stat of the process whose folder dir is, as in /proc/self.
func ReadIn(dir string) (Stat, error) {
	file := filepath.Join(dir, "stat")
	b, err := os.ReadFile(file)
	if err != nil {
		return Stat{}, err
	}
	// The name stands in parentheses and may hold parentheses itself.
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return Stat{}, fmt.Errorf("%s has no name", file)
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 20 {
		return Stat{}, fmt.Errorf("%s is short", file)
	}
	parent, err := strconv.Atoi(f[1]) // field 4 of the file
	if err != nil {
		return Stat{}, fmt.Errorf("%s: %w", file, err)
	}
	start, err := strconv.ParseUint(f[19], 10, 64) // field 22
	if err != nil {
		return Stat{}, fmt.Errorf("%s: %w", file, err)
	}
	return Stat{Name: string(b[open+1 : end]), State: f[0][0], Parent: parent, Start: start}, nil
}
