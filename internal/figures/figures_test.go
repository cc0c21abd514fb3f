package figures

import (
	"math"
	"testing"
	"time"
)

func TestFigures(t *testing.T) {
	for _, row := range []struct{ got, want string }{
		{Count(0), "0"},
		{Count(999), "999"},
		{Count(1234567), "1,234,567"},
		{Count(-1000), "-1,000"},
		{Count(int64(math.MaxInt64)), "9,223,372,036,854,775,807"},
		{Plural(0, "call"), "0 calls"},
		{Plural(1, "call"), "1 call"},
		{Plural(1200, "call"), "1,200 calls"},
		{Share(0), "0 %"},
		{Share(0.0001), "<1 %"},
		{Share(0.424), "42 %"},
		{Share(0.9999), ">99 %"},
		{Share(1), "100 %"},
		{Length(-time.Second), "0 s"},
		{Length(time.Microsecond), "<1 ms"},
		{Length(999 * time.Millisecond), "999 ms"},
		{Length(59*time.Second + 990*time.Millisecond), "59.9 s"},
		{Length(61 * time.Second), "1m 01s"},
		{Length(99*time.Hour + 59*time.Minute), "99h 59m"},
		{Length(101 * time.Hour), "4d 05h"},
		{Bytes(int64(0)), "0 bytes"},
		{Bytes(int64(1)), "1 byte"},
		{Bytes(int64(1023)), "1,023 bytes"},
		{Bytes(int64(1024)), "1 KiB"},
		{Bytes(int64(1536)), "1.5 KiB"},
		{Bytes(uint64(5 << 20)), "5 MiB"},
		{Bytes(int64(3 << 40)), "3 TiB"},
		{Bytes(int64(5000 << 40)), "5000 TiB"},
	} {
		if row.got != row.want {
			t.Errorf("got %q, want %q", row.got, row.want)
		}
	}
}
