// Command strain uses what the shim relies on in a runtime whose start was cut short.
package main

import (
	"fmt"
	"hash/maphash"
	"os"
	"strings"
	"time"
)

// lean is set by leanbuild.
var lean string

func main() {
	fmt.Println("lean", lean)
	fmt.Println("nil", recovered(func() { var p *int; *p = 1 }))
	fmt.Println("index", recovered(func() { s := os.Args; _ = s[len(s)+1] }))
	fmt.Println("divide", recovered(func() { z := len(os.Args) - len(os.Args); _ = 1 / z }))
	fmt.Println("stack", deep(100000))
	total := 0
	for i := range 2000 { // 200 MB, never collected
		total += len(make([]byte, 100<<10)) + i - i
	}
	fmt.Println("memory", total)
	m := map[string]int{}
	for i := range 10000 {
		m[strings.Repeat("k", i%50)+fmt.Sprint(i)] = i
	}
	fmt.Println("map", len(m))
	fmt.Println("hash", maphash.String(maphash.MakeSeed(), "x") != maphash.String(maphash.MakeSeed(), "x"))
	start := time.Now()
	time.Sleep(20 * time.Millisecond)
	fmt.Println("clock", time.Since(start) >= 20*time.Millisecond && time.Now().Year() > 2000)
	threads, _ := os.ReadDir("/proc/self/task")
	fmt.Println("threads", len(threads))
	os.Exit(7)
}

func recovered(f func()) (ok bool) {
	defer func() { ok = recover() != nil }()
	f()
	return false
}

func deep(n int) int {
	var pad [64]byte
	if n == 0 {
		return int(pad[0])
	}
	return 1 + deep(n-1) + int(pad[n%64])
}
