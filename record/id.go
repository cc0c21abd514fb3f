package record

import (
	"hash/maphash"
	"time"
)

// NewID returns a new UUIDv7 (RFC 9562, section 5.7) for the time now: 48 bits of
// Unix milliseconds, 12 bits of the fraction of the millisecond (the RFC's
// monotonic method 3), and 62 random bits, so that ids of one process sort by
// time and two processes never make the same.
//
// The random bits come from the runtime's per-process seed, which the kernel's
// random source feeds (AT_RANDOM, getrandom): no descriptor is opened, and no
// record is lost where /dev/urandom is not there.
func NewID(now time.Time) string {
	var h maphash.Hash // a new random seed for each value
	h.SetSeed(maphash.MakeSeed())
	h.WriteByte(1)
	return uuid7(now, h.Sum64()&^derivedBit)
}

// derivedBit is the highest of the 62 random bits: 1 in the ids of DeriveID, 0 in
// those of NewID. What is derived can be computed in advance by whoever knows the
// parts; a job that sent an invocation under the id of its own job.end would have that
// dropped as a duplicate. The bit keeps the two apart.
const derivedBit = 1 << 61

// InvocationID returns the id under which an invocation of this id is kept, and false
// for what is no UUIDv7 in lower case. An id with the mark of a derived one loses it.
func InvocationID(id string) (string, bool) {
	if len(id) != 36 || id[14] != '7' || id[19] != '8' && id[19] != '9' && id[19] != 'a' && id[19] != 'b' {
		return "", false
	}
	for i := range len(id) {
		c := id[i]
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (c == '-') || !dash && (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return "", false
		}
	}
	switch id[19] { // 10 and two random bits, of which the first is the mark
	case 'a':
		id = id[:19] + "8" + id[20:]
	case 'b':
		id = id[:19] + "9" + id[20:]
	}
	return id, true
}

// DeriveID returns a UUIDv7 for the time ts whose random bits are a hash of
// parts: the same event, read twice, gets the same id twice, and so is counted
// once.
func DeriveID(ts time.Time, parts ...string) string {
	// FNV-1a with 64 bits, then a finaliser (the one of MurmurHash3, 2011) that
	// spreads late differences into the high bits.
	h := uint64(14695981039346656037)
	for _, p := range parts {
		for i := 0; i < len(p); i++ {
			h = (h ^ uint64(p[i])) * 1099511628211
		}
		h = (h ^ 0xff) * 1099511628211 // 0xff is no UTF-8: ("a","b") is not ("ab")
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return uuid7(ts, h|derivedBit)
}

func uuid7(ts time.Time, random uint64) string {
	ms := uint64(ts.UnixMilli())
	fraction := uint64(ts.Nanosecond()%1e6) << 12 / 1e6
	hi := ms<<16 | 7<<12 | fraction
	lo := random&(1<<62-1) | 2<<62
	var b [36]byte
	n := 0
	for _, v := range [2]uint64{hi, lo} {
		for shift := 60; shift >= 0; shift -= 4 {
			if n == 8 || n == 13 || n == 18 || n == 23 {
				b[n] = '-'
				n++
			}
			b[n] = hexDigits[v>>shift&15]
			n++
		}
	}
	return string(b[:])
}
