package prefix

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/record/recordjson"
)

// Records reads the whole journal, the plain way that a shell script with jq would.
// It is strict where the product's own reader forgives: a line that is no record,
// or has no end, is an error.
func (p *Prefix) Records() ([]record.Record, error) {
	segments, err := filepath.Glob(filepath.Join(p.Journal(), "records-*.jsonl"))
	if err != nil {
		return nil, err
	}
	var records []record.Record
	for _, segment := range segments { // Glob sorts; the names sort by number
		data, err := os.ReadFile(segment)
		if err != nil {
			return nil, err
		}
		for n := 1; len(data) > 0; n++ {
			line, rest, whole := bytes.Cut(data, []byte("\n"))
			if !whole {
				return records, fmt.Errorf("%s:%d: the last line has no end: %.80q", segment, n, line)
			}
			data = rest
			if bytes.HasPrefix(line, []byte(`{"kind":"segment"`)) {
				continue
			}
			var r record.Record
			if err := recordjson.Unmarshal(line, &r); err != nil {
				return records, fmt.Errorf("%s:%d: %w: %.80q", segment, n, err, line)
			}
			records = append(records, r)
		}
	}
	return records, nil
}
