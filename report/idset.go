package report

import "hash/maphash"

// id is a record's id in sixteen bytes: the bytes of the UUID itself, or, for an
// id that is no UUID, 128 bits of hash.
type id [16]byte

// mark is what the report remembers of one id.
type mark uint8

const (
	markUsed     mark = 1 << iota // the slot holds an id
	markRecord                    // a record with this id was read
	markCall                      // that record is an invocation
	markSelected                  // the invocation is one that the filters let through
	markOwn                       // it is one of the job's own: not nested, not outside a job
	markEnded                     // its end was read
)

const idShards = 256

// idSet remembers every id that was read, with one byte of marks for each: exact
// removal of duplicates, and the join of an invocation with its end, in 17 bytes
// a slot. Open addressing with linear probing in 256 shards that grow one by one,
// by a quarter, so that growing never needs twice the memory of the whole.
type idSet struct {
	seed   maphash.Seed // random: ids come from files that jobs can write to, and chosen ids must not make long probe chains
	shards [idShards]idShard
	n      int
}

type idShard struct {
	ids   []id
	marks []mark
	n     int
}

func newIDSet() *idSet { return &idSet{seed: maphash.MakeSeed()} }

// key turns a record's id into its sixteen bytes.
func (s *idSet) key(text []byte) id {
	var k id
	if parseUUID(&k, text) {
		return k
	}
	h := maphash.Bytes(s.seed, text)
	var hash maphash.Hash
	hash.SetSeed(s.seed)
	_, _ = hash.Write([]byte{0xff}) // a second, independent half
	_, _ = hash.Write(text)
	h2 := hash.Sum64()
	for i := range 8 {
		k[i] = byte(h >> (8 * i))
		k[8+i] = byte(h2 >> (8 * i))
	}
	return k
}

// parseUUID reads the 8-4-4-4-12 form.
func parseUUID(k *id, text []byte) bool {
	if len(text) != 36 || text[8] != '-' || text[13] != '-' || text[18] != '-' || text[23] != '-' {
		return false
	}
	at := 0
	for i := 0; i < 36; i++ {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			continue
		}
		c := text[i]
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return false
		}
		k[at/2] = k[at/2]<<4 | c
		at++
	}
	return true
}

// at returns the marks of k, adding k when it is new. The pointer is good until
// the next call.
func (s *idSet) at(k id) *mark {
	h := maphash.Comparable(s.seed, k)
	sh := &s.shards[h%idShards]
	if sh.n*5 >= len(sh.ids)*4 {
		s.grow(sh)
	}
	i := slot(h, len(sh.ids))
	for sh.marks[i]&markUsed != 0 {
		if sh.ids[i] == k {
			return &sh.marks[i]
		}
		if i++; i == len(sh.ids) {
			i = 0
		}
	}
	sh.ids[i] = k
	sh.marks[i] = markUsed
	sh.n++
	s.n++
	return &sh.marks[i]
}

func (s *idSet) grow(sh *idShard) {
	size := len(sh.ids) + len(sh.ids)/4
	if size < 16 {
		size = 16
	}
	ids, marks := make([]id, size), make([]mark, size)
	for j, m := range sh.marks {
		if m&markUsed == 0 {
			continue
		}
		i := slot(maphash.Comparable(s.seed, sh.ids[j]), size)
		for marks[i]&markUsed != 0 {
			if i++; i == size {
				i = 0
			}
		}
		ids[i], marks[i] = sh.ids[j], m
	}
	sh.ids, sh.marks = ids, marks
}

// slot maps the upper half of a hash to 0..n-1 without a division
// (https://lemire.me/blog/2016/06/27/a-fast-alternative-to-the-modulo-reduction/);
// the lower bits chose the shard.
func slot(h uint64, n int) int { return int((h >> 32) * uint64(n) >> 32) }
