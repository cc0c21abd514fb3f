package journal

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// Listing a directory is no look at one moment: of two segments that come meanwhile, the
// later one may be listed and the earlier one not. A reader that is always at the end
// must pass over none of them for that.
func TestSegmentsThatComeWhileTheDirectoryIsListed(t *testing.T) {
	dir := t.TempDir()
	d, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(n uint64) bool {
		f, _, err := d.create(n, int64(n-1), time.Now())
		if err == nil {
			_, err = f.Append(line(fmt.Sprint(n), 0))
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			t.Error(err)
		}
		return err == nil
	}
	for i := range 2000 { // so that a list takes many calls
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("foreign-%024d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	begin(1)
	const segments = 2000
	written := make(chan struct{})
	var passed atomic.Uint64 // by the reader
	go func() {
		defer close(written)
		removed := uint64(0)
		for n := uint64(2); n <= segments && begin(n) && !t.Failed(); n++ {
			for ; removed+1 < passed.Load(); removed++ { // or the lists get long
				if err := os.Remove(filepath.Join(dir, segmentName(removed+1))); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	defer func() {
		<-written
		_ = d.f.Close() // only listed and made files in
	}()
	r := reader(t, dir, Position{})
	want := uint64(1)
	for ended := false; ; {
		l, err := r.Next()
		switch {
		case err == nil:
			if got := string(l.ID()); got != fmt.Sprint(want) {
				t.Fatalf("record %s came where %d is next: %+v", got, want, r.Stats())
			}
			passed.Store(want)
			want++
		case !errors.Is(err, io.EOF):
			t.Fatal(err)
		case ended && want != segments+1:
			t.Fatalf("%d of %d records", want-1, segments)
		case ended:
			return
		default:
			r.listed = time.Time{} // as after relistEvery
			select {
			case <-written:
				ended = true
			default:
			}
		}
	}
}
