package bq

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files again; a released schema only where BigQuery would let it evolve so")

// version is the file in schemas that the current schema belongs to. It grows when the
// first change after a release is made.
const version = "schemas/v1.json"

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", " ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// undescribed drops the descriptions, which may change at any time.
func undescribed(fields []Field) []Field {
	fields = slices.Clone(fields)
	for i := range fields {
		fields[i].Description = ""
		fields[i].Fields = undescribed(fields[i].Fields)
	}
	return fields
}

// A table that any released version made can be evolved to today's columns.
func TestReleasedSchemasEvolve(t *testing.T) {
	if err := Valid(Schema()); err != nil {
		t.Fatal("BigQuery would refuse the table:", err)
	}
	current := marshal(t, undescribed(Schema()))
	if _, err := os.Stat(version); os.IsNotExist(err) && *update {
		if err := os.WriteFile(version, current, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	files, err := filepath.Glob("schemas/v*.json")
	if err != nil || !slices.Contains(files, version) {
		t.Errorf("%s is not there (%v)", version, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var released []Field
		if err := json.Unmarshal(data, &released); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		_, changes, err := Evolve(released, undescribed(Schema()))
		if err != nil {
			t.Errorf("a table of %s cannot become today's: %v", file, err)
		}
		for _, c := range changes {
			if c.Kind == Foreign {
				t.Errorf("%s has the column %s, and today's rows have not: BigQuery keeps it, and questions about it find nothing", file, c.Path)
			}
		}
		if file != version || bytes.Equal(data, current) {
			continue
		}
		if !*update {
			t.Errorf("%s is not today's schema (where the change is meant: go test ./bq -run Released -update)", file)
		} else if !t.Failed() {
			if err := os.WriteFile(file, current, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestEveryColumnIsDescribed(t *testing.T) {
	n := 0
	var look func(fields []Field, prefix string)
	look = func(fields []Field, prefix string) {
		for _, f := range fields {
			n++
			if len(strings.Fields(f.Description)) < 4 {
				t.Errorf("%s%s has the description %q", prefix, f.Name, f.Description)
			}
			look(f.Fields, prefix+f.Name+".")
		}
	}
	look(Schema(), "")
	if n < 100 {
		t.Errorf("only %d columns were looked at", n)
	}
	for _, c := range append(ClusterBy(), PartitionBy) {
		if !slices.ContainsFunc(Schema(), func(f Field) bool { return f.Name == c && f.Mode != "REPEATED" && len(f.Fields) == 0 }) {
			t.Errorf("%s is no plain column at the top", c)
		}
	}
}

func nested(depth int) []Field {
	f := Field{Name: "leaf", Type: "STRING"}
	for range depth {
		f = Field{Name: "r", Type: "RECORD", Fields: []Field{f}}
	}
	return []Field{f}
}

func TestEvolve(t *testing.T) {
	const base = `[{"name":"id","type":"STRING","mode":"REQUIRED"},{"name":"n","type":"INTEGER","mode":"NULLABLE"},
		{"name":"tags","type":"STRING","mode":"REPEATED"},{"name":"ci","type":"RECORD","mode":"NULLABLE","fields":[{"name":"a","type":"STRING","mode":"NULLABLE"}]}]`
	const id, n, tags, ci = `{"name":"id","type":"STRING","mode":"REQUIRED"}`, `{"name":"n","type":"INTEGER","mode":"NULLABLE"}`,
		`{"name":"tags","type":"STRING","mode":"REPEATED"}`, `{"name":"ci","type":"RECORD","mode":"NULLABLE","fields":[{"name":"a","type":"STRING","mode":"NULLABLE"}]}`
	for _, c := range []struct {
		name    string
		want    []string
		changes string
		refused string // in the error
	}{
		{"the same", []string{id, n, tags, ci}, "[]", ""},
		{"the same in other words", []string{id, `{"name":"n","type":"INT64"}`, tags, strings.Replace(ci, "RECORD", "STRUCT", 1)}, "[]", ""},
		{"another order", []string{ci, tags, n, id}, "[]", ""},
		{"a column more", []string{id, `{"name":"new","type":"DATE"}`, n, tags, ci}, "[{add new}]", ""},
		{"a repeated column more", []string{id, n, tags, ci, `{"name":"new","type":"STRING","mode":"REPEATED"}`}, "[{add new}]", ""},
		{"a field more in a record", []string{id, n, tags, `{"name":"ci","type":"RECORD","fields":[{"name":"b","type":"BOOL"},{"name":"a","type":"STRING"}]}`}, "[{add ci.b}]", ""},
		{"a relaxation", []string{`{"name":"id","type":"STRING"}`, n, tags, ci}, "[{relax id}]", ""},
		{"a description", []string{id, `{"name":"n","type":"INTEGER","description":"how many"}`, tags, ci}, "[{describe n}]", ""},
		{"a column less", []string{id, tags, ci}, "[{keep n}]", ""},
		{"a required column less", []string{n, tags, ci}, "[{keep id} {relax id}]", ""},
		{"a field less", []string{id, n, tags, `{"name":"ci","type":"RECORD","fields":[{"name":"b","type":"STRING"}]}`}, "[{keep ci.a} {add ci.b}]", ""},

		{"a type", []string{id, `{"name":"n","type":"STRING"}`, tags, ci}, "", "n: the type INTEGER cannot become STRING"},
		{"a wider type", []string{id, `{"name":"n","type":"FLOAT"}`, tags, ci}, "", "n: the type INTEGER cannot become FLOAT"},
		{"a type in a record", []string{id, n, tags, `{"name":"ci","type":"RECORD","fields":[{"name":"a","type":"INTEGER"}]}`}, "", "ci.a: the type STRING cannot become INTEGER"},
		{"a record flattened", []string{id, n, tags, `{"name":"ci","type":"STRING"}`}, "", "ci: the type RECORD cannot become STRING"},
		{"required after all", []string{id, `{"name":"n","type":"INTEGER","mode":"REQUIRED"}`, tags, ci}, "", "n: a NULLABLE column cannot become REQUIRED"},
		{"repeated after all", []string{id, `{"name":"n","type":"INTEGER","mode":"REPEATED"}`, tags, ci}, "", "n: a NULLABLE column cannot become REPEATED"},
		{"once after all", []string{id, n, `{"name":"tags","type":"STRING"}`, ci}, "", "tags: a REPEATED column cannot become NULLABLE"},
		{"required and new", []string{id, n, tags, ci, `{"name":"new","type":"STRING","mode":"REQUIRED"}`}, "", "new: a REQUIRED column cannot be added"},
		{"required in a new record", []string{id, n, tags, ci, `{"name":"new","type":"RECORD","fields":[{"name":"x","type":"STRING","mode":"REQUIRED"}]}`}, "", "new.x: a REQUIRED column cannot be added"},
		{"another case", []string{id, `{"name":"N","type":"INTEGER"}`, tags, ci}, "", "n: cannot become N"},
		{"a name with a dash", []string{id, n, tags, ci, `{"name":"a-b","type":"STRING"}`}, "", "a-b: a column's name has letters"},
		{"a name that begins with a digit", []string{id, n, tags, ci, `{"name":"1a","type":"STRING"}`}, "", "1a: a column's name has letters"},
		{"a name of BigQuery's", []string{id, n, tags, ci, `{"name":"_partitiontime","type":"STRING"}`}, "", "_partitiontime: the beginning of this name"},
		{"two names that differ in case", []string{id, n, tags, ci, `{"name":"x","type":"STRING"}`, `{"name":"X","type":"STRING"}`}, "", "X: the same name as x"},
		{"a type that is not", []string{id, n, tags, ci, `{"name":"x","type":"TEXT"}`}, "", `x: there is no type "TEXT"`},
		{"a record without fields", []string{id, n, tags, ci, `{"name":"x","type":"RECORD"}`}, "", "x: a RECORD has fields"},
		{"a long description", []string{id, n, tags, ci, `{"name":"x","type":"STRING","description":"` + strings.Repeat("ü", 1025) + `"}`}, "", "x: the description has 1025 characters"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var have, want []Field
			if err := json.Unmarshal([]byte(base), &have); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte("["+strings.Join(c.want, ",")+"]"), &want); err != nil {
				t.Fatal(err)
			}
			merged, changes, err := Evolve(have, want)
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("Evolve says %v, want %q", err, c.refused)
				}
				return
			}
			if err != nil || fmt.Sprint(changes) != c.changes {
				t.Errorf("Evolve gives %v and %v, want %s", changes, err, c.changes)
			}
			for i, h := range have {
				if merged[i].Name != h.Name {
					t.Errorf("column %d is %s, and was %s: new columns go to the end", i, merged[i].Name, h.Name)
				}
			}
			for _, w := range want {
				if !slices.ContainsFunc(merged, func(f Field) bool { return f.Name == w.Name }) {
					t.Errorf("%s is missing", w.Name)
				}
			}
			if again, changes, err := Evolve(merged, want); err != nil || slices.ContainsFunc(changes, func(c Change) bool { return c.Kind != Foreign }) ||
				!bytes.Equal(marshal(t, again), marshal(t, merged)) {
				t.Errorf("a second time Evolve gives %v and %v", changes, err)
			}
		})
	}
	if err := Valid(nested(15)); err != nil {
		t.Error("15 levels:", err)
	}
	if err := Valid(nested(16)); err == nil || !strings.Contains(err.Error(), "nested deeper than 15") {
		t.Error("16 levels:", err)
	}
	many := make([]Field, 10_001)
	for i := range many {
		many[i] = Field{Name: fmt.Sprint("c", i), Type: "STRING"}
	}
	if err := Valid(many[:10_000]); err != nil {
		t.Error("10,000 columns:", err)
	}
	if err := Valid(many); err == nil || !strings.Contains(err.Error(), "10001 columns") {
		t.Error("10,001 columns:", err)
	}
}

// A kept table that was evolved has its new columns at the end, wherever the query has them.
func TestRefreshNamesTheColumns(t *testing.T) {
	inserts := 0
	for _, sql := range RefreshSQL("p", "d") {
		for _, v := range Views() {
			if strings.HasPrefix(sql, "INSERT INTO `p.d."+v.Name+"` (`"+v.Columns[0].Name+"`, ") {
				inserts++
			}
		}
	}
	if inserts != len(tables) {
		t.Errorf("%d of %d tables are filled by columns' names", inserts, len(tables))
	}
}
