package importer

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"
	"unicode/utf8"
)

// decode returns the text of r in UTF-8 without its byte order mark: gzip is unpacked,
// UTF-16 is told by its mark, or by the zero bytes of an ASCII heading.
func decode(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(2)
	if err != nil && err != io.EOF {
		return nil, err
	}
	var unpacked io.Closer = io.NopCloser(nil)
	if bytes.Equal(head, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("unpack gzip: %w", err)
		}
		unpacked, b = z, bufio.NewReaderSize(z, 64<<10)
	}
	head, err = b.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	zero := func(i int) bool { return len(head) == 4 && head[i] == 0 }
	switch {
	case bytes.HasPrefix(head, []byte{0xef, 0xbb, 0xbf}):
		_, _ = b.Discard(3)
	case bytes.HasPrefix(head, []byte{0xff, 0xfe}):
		_, _ = b.Discard(2)
		return text{&utf16Reader{r: b}, unpacked}, nil
	case bytes.HasPrefix(head, []byte{0xfe, 0xff}):
		_, _ = b.Discard(2)
		return text{&utf16Reader{r: b, big: true}, unpacked}, nil
	case zero(1) && zero(3):
		return text{&utf16Reader{r: b}, unpacked}, nil
	case zero(0) && zero(2):
		return text{&utf16Reader{r: b, big: true}, unpacked}, nil
	}
	return text{b, unpacked}, nil
}

type text struct {
	io.Reader
	io.Closer
}

// utf16Reader turns UTF-16 into UTF-8. A half of a surrogate pair becomes U+FFFD.
type utf16Reader struct {
	r    *bufio.Reader
	big  bool
	held rune   // the first half of a pair
	out  []byte // not yet read
	buf  [512]byte
}

func (u *utf16Reader) unit() (rune, error) {
	var two [2]byte
	if _, err := io.ReadFull(u.r, two[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return utf8.RuneError, nil // an odd byte at the end
		}
		return 0, err
	}
	if u.big {
		return rune(two[0])<<8 | rune(two[1]), nil
	}
	return rune(two[1])<<8 | rune(two[0]), nil
}

func (u *utf16Reader) Read(p []byte) (int, error) {
	for len(u.out) == 0 {
		u.out = u.buf[:0]
		for len(u.out) < len(u.buf)-8 {
			c, err := u.unit()
			if err != nil {
				if u.held != 0 {
					u.out, u.held = utf8.AppendRune(u.out, utf8.RuneError), 0
				}
				if len(u.out) > 0 {
					break
				}
				return 0, err
			}
			if u.held != 0 {
				pair := utf16.DecodeRune(u.held, c)
				u.held = 0
				u.out = utf8.AppendRune(u.out, pair)
				if pair != utf8.RuneError {
					continue
				}
			}
			if c >= 0xd800 && c < 0xdc00 {
				u.held = c
				continue
			}
			u.out = utf8.AppendRune(u.out, c)
		}
	}
	n := copy(p, u.out)
	u.out = u.out[n:]
	return n, nil
}
