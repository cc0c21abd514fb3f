// Package recordjson decodes records. It is apart from package record because it
// needs encoding/json, which the docker shim must not carry.
//
// Its decoder is generated from the record's struct like the encoder. It is
// stricter than encoding/json would be: keys match by exact case only, so that a
// hostile writer cannot hide a second "ID" behind an "id"; and it keeps the members
// it does not know, so that a record survives a reader older than its writer.
package recordjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/record"
)

// ErrSyntax is returned for a line that is not one JSON object.
var ErrSyntax = errors.New("not a JSON object")

// Unmarshal decodes one line, with or without its newline, into r and overwrites
// all of r. Members that r's struct does not know are kept in the Unknown fields.
// A member of the wrong type is an error that names it; of a member that occurs
// twice the last one counts.
func Unmarshal(line []byte, r *record.Record) error {
	*r = record.Record{}
	if !utf8.Valid(line) {
		line = bytes.ToValidUTF8(line, []byte("\ufffd"))
	}
	// Valid first: the decoder below may then walk without checking the syntax.
	if !json.Valid(line) {
		return fmt.Errorf("decode record: %w", ErrSyntax)
	}
	d := decoder{data: line}
	d.space()
	if d.data[d.pos] != '{' {
		return fmt.Errorf("decode record: %w", ErrSyntax)
	}
	d.objectRecord(r)
	if d.err != nil {
		return fmt.Errorf("decode record: %w", d.err)
	}
	return nil
}

// decoder walks over JSON that is known to be valid. The first error sticks.
type decoder struct {
	data []byte
	pos  int
	key  []byte // the member being decoded, for errors
	err  error
}

func (d *decoder) space() {
	for d.pos < len(d.data) {
		switch d.data[d.pos] {
		case ' ', '\t', '\n', '\r':
			d.pos++
		default:
			return
		}
	}
}

func (d *decoder) fail(want string) {
	if d.err == nil {
		d.err = fmt.Errorf("member %q: want %s", d.key, want)
	}
	d.skip()
}

// object walks over an object and calls member at each value; where member does
// not know the key, the member is kept in unknown. A key that differs from a known
// one in case alone is dropped: BigQuery's columns and many JSON libraries do not
// tell the two apart, and would let the second replace the first.
func (d *decoder) object(unknown *[]byte, known []string, member func(key []byte) bool) {
	if d.data[d.pos] != '{' {
		d.fail("an object")
		return
	}
	d.pos++
	for {
		d.space()
		switch d.data[d.pos] {
		case '}':
			d.pos++
			return
		case ',':
			d.pos++
			continue
		}
		start := d.pos
		d.skipString()
		rawKey := d.data[start:d.pos]
		key := rawKey[1 : len(rawKey)-1]
		if bytes.IndexByte(key, '\\') >= 0 {
			key = []byte(unquote(rawKey))
		}
		d.space()
		d.pos++ // the colon
		d.space()
		d.key = key
		value := d.pos
		if member(key) {
			continue
		}
		d.skip()
		if !slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, string(key)) }) {
			*unknown = append(append(append(append(*unknown, ','), rawKey...), ':'), d.data[value:d.pos]...)
		}
	}
}

func (d *decoder) array(element func()) {
	if d.null() {
		return
	}
	if d.data[d.pos] != '[' {
		d.fail("an array")
		return
	}
	d.pos++
	for {
		d.space()
		switch d.data[d.pos] {
		case ']':
			d.pos++
			return
		case ',':
			d.pos++
			d.space()
		}
		element()
	}
}

// null takes a null and tells whether there was one; absent and null are the same.
func (d *decoder) null() bool {
	if d.data[d.pos] == 'n' {
		d.pos += len("null")
		return true
	}
	return false
}

func (d *decoder) string() string {
	if d.null() {
		return ""
	}
	if d.data[d.pos] != '"' {
		d.fail("a string")
		return ""
	}
	start := d.pos
	d.skipString()
	return unquote(d.data[start:d.pos])
}

// unquote returns the string that a valid JSON string stands for.
func unquote(raw []byte) string {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1])
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		panic(err) // the line was checked to be valid
	}
	return s
}

func (d *decoder) int() int64 {
	if d.null() {
		return 0
	}
	start := d.pos
	if c := d.data[start]; c != '-' && (c < '0' || c > '9') {
		d.fail("an integer")
		return 0
	}
	d.skip()
	v, err := strconv.ParseInt(string(d.data[start:d.pos]), 10, 64)
	if err != nil && d.err == nil {
		d.err = fmt.Errorf("member %q: want an integer of 64 bits", d.key)
	}
	return v
}

func (d *decoder) intPointer() *int64 {
	if d.null() {
		return nil
	}
	v := d.int()
	return &v
}

func (d *decoder) bool() bool {
	switch d.data[d.pos] {
	case 't':
		d.pos += len("true")
		return true
	case 'f':
		d.pos += len("false")
		return false
	case 'n':
		d.null()
		return false
	}
	d.fail("true or false")
	return false
}

func (d *decoder) time() time.Time {
	if d.null() {
		return time.Time{}
	}
	s := d.string()
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil && d.err == nil {
		d.err = fmt.Errorf("member %q: want a time in RFC 3339", d.key)
	}
	return t.UTC()
}

// skip moves over one value of any type.
func (d *decoder) skip() {
	depth := 0
	for {
		switch d.data[d.pos] {
		case '"':
			d.skipString()
		case '{', '[':
			depth++
			d.pos++
		case '}', ']':
			depth--
			d.pos++
		case ',', ':', ' ', '\t', '\n', '\r':
			d.pos++
			continue
		default: // a number or a word
			for d.pos < len(d.data) && strings.IndexByte(",:]} \t\r\n", d.data[d.pos]) < 0 {
				d.pos++
			}
		}
		if depth == 0 {
			return
		}
	}
}

// skipString moves over a string.
func (d *decoder) skipString() {
	d.pos++
	for d.data[d.pos] != '"' {
		if d.data[d.pos] == '\\' {
			d.pos++
		}
		d.pos++
	}
	d.pos++
}
