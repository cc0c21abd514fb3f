package importer

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"strings"
)

// textLine is a line with its end. Of one longer than MaxRow nothing is kept.
type textLine struct {
	text []byte
	long bool
}

// input gives the lines of a text. It can take lines back, for a row that began with a
// quote that nobody closed.
type input struct {
	r    *bufio.Reader
	back []textLine // to be read again, the next one first
	line int64      // number of the last line given
	buf  []byte
}

// next returns the next line, good until the next call.
func (in *input) next() (textLine, error) {
	if len(in.back) > 0 {
		l := in.back[0]
		in.back = in.back[1:]
		in.line++
		return l, nil
	}
	in.back = nil
	in.buf = in.buf[:0]
	long := false
	for {
		part, err := in.r.ReadSlice('\n')
		if long = long || len(in.buf)+len(part) > MaxRow; long {
			in.buf = in.buf[:0]
		} else {
			in.buf = append(in.buf, part...)
		}
		switch {
		case err == bufio.ErrBufferFull:
		case err == nil || err == io.EOF && (len(in.buf) > 0 || long):
			in.line++
			return textLine{in.buf, long}, nil
		default:
			return textLine{}, err
		}
	}
}

// unread takes back the last lines that were given.
func (in *input) unread(lines ...textLine) {
	in.back = append(lines, in.back...)
	in.line -= int64(len(lines))
}

// csvRows splits CSV as RFC 4180 says, and as tables in the wild are: with any
// delimiter, and quotes inside cells that do not begin with one are taken as they are.
type csvRows struct {
	in        *input
	delimiter rune
	raw       []byte
	cells     []string
}

func (c *csvRows) next() (row, error) {
	for {
		l, err := c.in.next()
		if err != nil {
			return row{}, err
		}
		r := row{line: c.in.line}
		if l.long {
			return r, tooLong(r.line)
		}
		if len(bytes.TrimSpace(l.text)) == 0 {
			continue // an empty line is no row
		}
		if c.delimiter == 0 {
			rest, _ := c.in.r.Peek(32 << 10) // an error comes again with the next line
			c.delimiter = delimiterOf(append(bytes.Clone(l.text), rest...))
		}
		c.raw = append(c.raw[:0], l.text...)
		reason, err := c.whole()
		if err != nil {
			return row{}, err
		}
		if reason != "" {
			// The row ends with its first line: what a stray quote swallowed is read again.
			if at := bytes.IndexByte(c.raw, '\n'); at >= 0 && at < len(c.raw)-1 {
				var again []textLine
				for rest := bytes.Clone(c.raw[at+1:]); len(rest) > 0; {
					n := bytes.IndexByte(rest, '\n') + 1
					if n == 0 {
						n = len(rest)
					}
					again = append(again, textLine{text: rest[:n]})
					rest = rest[n:]
				}
				c.in.unread(again...)
			}
			return r, &BadRow{Line: r.line, Reason: reason}
		}
		r.raw, r.cells = bytes.TrimRight(c.raw, "\r\n"), c.cells
		return r, nil
	}
}

func tooLong(line int64) *BadRow { return &BadRow{Line: line, Reason: "longer than 256 KiB"} }

// whole reads lines until the row in raw is a whole one, and splits it.
func (c *csvRows) whole() (reason string, err error) {
	open, reason := c.split()
	for open && reason == "" {
		more, err := c.in.next()
		if err == io.EOF {
			return "a quote is opened and not closed", nil
		}
		if err != nil {
			return "", err
		}
		if more.long || len(c.raw)+len(more.text) > MaxRow {
			c.in.unread(textLine{bytes.Clone(more.text), more.long})
			return "a quote is opened and not closed", nil
		}
		c.raw = append(c.raw, more.text...)
		if bytes.IndexByte(more.text, '"') >= 0 { // nothing else can end the cell
			open, reason = c.split()
		}
	}
	return reason, nil
}

// split cuts raw into cells. open is true where a quoted cell goes on in the next line.
func (c *csvRows) split() (open bool, reason string) {
	c.cells = c.cells[:0]
	s := string(bytes.TrimRight(c.raw, "\r\n"))
	delimiter := string(c.delimiter)
	for {
		if !strings.HasPrefix(s, `"`) {
			cell, rest, more := strings.Cut(s, delimiter)
			c.cells = append(c.cells, cell)
			if !more {
				return false, ""
			}
			s = rest
			continue
		}
		s = s[1:]
		end, doubled := 0, false
		for {
			n := strings.IndexByte(s[end:], '"')
			if n < 0 {
				return true, ""
			}
			if end += n; end+1 == len(s) || s[end+1] != '"' {
				break
			}
			end, doubled = end+2, true
		}
		cell := s[:end]
		if doubled {
			cell = strings.ReplaceAll(cell, `""`, `"`)
		}
		c.cells = append(c.cells, cell)
		if s = s[end+1:]; s == "" {
			return false, ""
		}
		var ok bool
		if s, ok = strings.CutPrefix(s, delimiter); !ok {
			return false, "text behind the quote that ends a cell"
		}
	}
}

// delimiterOf is the delimiter that cuts most of the first lines into the same number of
// cells: neither a line before the heading nor user agents with semicolons decide.
func delimiterOf(head []byte) rune {
	best, mostLines, mostCells := ',', 0, 0
	for _, d := range ",;\t|" {
		counts := map[int]int{} // lines by the number of delimiters in them
		lines, n, quoted := 0, 0, false
		for _, c := range head {
			switch {
			case c == '"':
				quoted = !quoted
			case quoted:
			case rune(c) == d:
				n++
			case c == '\n':
				if n > 0 {
					counts[n]++
				}
				lines, n = lines+1, 0
			}
			if lines == 20 {
				break
			}
		}
		if n > 0 {
			counts[n]++ // the last line, which has no end
		}
		for cells, lines := range counts {
			if lines > mostLines || lines == mostLines && cells > mostCells {
				best, mostLines, mostCells = d, lines, cells
			}
		}
	}
	return best
}

// jsonRows reads JSON Lines: one object on each line.
type jsonRows struct{ in *input }

func (j *jsonRows) next() (row, error) {
	for {
		l, err := j.in.next()
		if err != nil {
			return row{}, err
		}
		if l.long {
			return row{line: j.in.line}, tooLong(j.in.line)
		}
		line := bytes.TrimSpace(l.text)
		if len(line) == 0 {
			continue
		}
		r := row{line: j.in.line, raw: line}
		d := json.NewDecoder(bytes.NewReader(line))
		d.UseNumber()
		var object map[string]any
		if d.Decode(&object) != nil || object == nil {
			return r, &BadRow{Line: j.in.line, Reason: "not a JSON object"}
		}
		if _, err := d.Token(); err != io.EOF {
			return r, &BadRow{Line: j.in.line, Reason: "more than one JSON value on the line"}
		}
		flat := map[string]string{}
		flatten(flat, "", object, 0)
		r.get = func(path string) (string, bool) { v, ok := flat[path]; return v, ok }
		for name := range flat {
			r.cells = append(r.cells, name) // names, for detection
		}
		return r, nil
	}
}

// flatten writes the scalar members of a JSON object to flat under their paths.
func flatten(flat map[string]string, prefix string, object map[string]any, depth int) {
	for key, value := range object {
		switch v := value.(type) {
		case string:
			flat[prefix+key] = v
		case json.Number:
			flat[prefix+key] = v.String()
		case bool:
			if v {
				flat[prefix+key] = "true"
			} else {
				flat[prefix+key] = "false"
			}
		case nil:
			flat[prefix+key] = ""
		case map[string]any:
			if depth < 8 {
				flatten(flat, prefix+key+".", v, depth+1)
			}
		case []any:
			var words []string
			for _, e := range v {
				if s, ok := e.(string); ok {
					words = append(words, s)
				}
			}
			flat[prefix+key] = strings.Join(words, ",")
		}
	}
}
