// Package analyse checks the project's SQL with the grammar and the type checker of
// GoogleSQL itself. It is a module of its own because the analyser, C++ turned into Go,
// takes minutes and gigabytes to compile; nobody who builds Tallyman needs it.
package analyse

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-googlesql"

	"github.com/tallyman-ci/tallyman/bq"
	"github.com/tallyman-ci/tallyman/desk/panels"
	"github.com/tallyman-ci/tallyman/internal/analysed"
	"github.com/tallyman-ci/tallyman/sinks/row"
)

var update = flag.Bool("update", false, "write ../columns.txt, and analysed.sum where all SQL passes")

const project, dataset = analysed.Project, analysed.Dataset

// analyser knows the tables and views that were added so far.
type analyser struct {
	catalog *googlesql.SimpleCatalog
	options *googlesql.AnalyzerOptions
	types   *googlesql.TypeFactory
}

func (a *analyser) of(c row.Column) (googlesql.Googlesql_TypeNode, error) {
	var t googlesql.Googlesql_TypeNode
	var err error
	switch c.Type {
	case row.String:
		t, err = a.types.MakeSimpleType(googlesql.TypeKindTypeString)
	case row.Integer:
		t, err = a.types.MakeSimpleType(googlesql.TypeKindTypeInt64)
	case row.Boolean:
		t, err = a.types.MakeSimpleType(googlesql.TypeKindTypeBool)
	case row.Timestamp:
		t, err = a.types.MakeSimpleType(googlesql.TypeKindTypeTimestamp)
	case row.Record:
		var fields []*googlesql.StructField
		for _, f := range c.Fields {
			ft, err := a.of(f)
			if err != nil {
				return nil, err
			}
			fields = append(fields, &googlesql.StructField{Name: f.Name, Type_: ft})
		}
		t, err = a.types.MakeStructType2(fields)
	default:
		err = fmt.Errorf("type %s", c.Type)
	}
	if err == nil && c.Mode == row.Repeated {
		return a.types.MakeArrayType2(t)
	}
	return t, err
}

type column struct {
	name string
	kind googlesql.Googlesql_TypeNode
}

func (a *analyser) add(name string, columns []column) error {
	table, err := googlesql.NewSimpleTable(project+"."+dataset+"."+name, -1)
	if err != nil {
		return err
	}
	for _, c := range columns {
		col, err := googlesql.NewSimpleColumn(name, c.name, c.kind, false, true)
		if err != nil {
			return err
		}
		if err := table.AddColumn2(col, false); err != nil {
			return err
		}
	}
	return a.catalog.AddTable(table)
}

// query analyses one query and returns the columns of its answer.
func (a *analyser) query(sql string) ([]column, error) {
	out, err := googlesql.AnalyzeStatement(bq.In(sql, project, dataset), a.options, a.catalog, a.types)
	if err != nil {
		return nil, err
	}
	stmt, err := out.ResolvedStatement()
	if err != nil {
		return nil, err
	}
	q, ok := stmt.(*googlesql.ResolvedQueryStmt)
	if !ok {
		return nil, fmt.Errorf("a %T, not a query", stmt)
	}
	list, err := q.OutputColumnList()
	if err != nil {
		return nil, err
	}
	var columns []column
	for _, o := range list {
		name, err := o.Name()
		if err != nil {
			return nil, err
		}
		c, err := o.Column()
		if err != nil {
			return nil, err
		}
		kind, err := c.Type()
		if err != nil {
			return nil, err
		}
		columns = append(columns, column{name, kind})
	}
	return columns, nil
}

func newAnalyser(t *testing.T) *analyser {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(googlesql.Init())
	var a analyser
	var err error
	a.types, err = googlesql.NewTypeFactory()
	must(err)
	a.catalog, err = googlesql.NewSimpleCatalog("catalog", a.types)
	must(err)
	language, err := googlesql.NewLanguageOptions()
	must(err)
	// More than BigQuery knows: what passes here is necessary, not sufficient.
	must(language.EnableMaximumLanguageFeatures())
	must(language.SetSupportsAllStatementKinds())
	must(a.catalog.AddBuiltinFunctionsAndTypes(&googlesql.BuiltinFunctionOptions{LanguageOptions: language}))
	a.options, err = googlesql.NewAnalyzerOptions2()
	must(err)
	must(a.options.SetLanguage(language))
	timestamp, err := a.types.MakeSimpleType(googlesql.TypeKindTypeTimestamp)
	must(err)
	text, err := a.types.MakeSimpleType(googlesql.TypeKindTypeString)
	must(err)
	number, err := a.types.MakeSimpleType(googlesql.TypeKindTypeInt64)
	must(err)
	must(a.options.AddQueryParameter("from", timestamp))
	must(a.options.AddQueryParameter("to", timestamp))
	for _, name := range []string{"repository", "workflow", "image"} {
		must(a.options.AddQueryParameter(name, text))
	}
	var columns []column
	for _, c := range row.Columns() {
		kind, err := a.of(c)
		must(err)
		columns = append(columns, column{c.Name, kind})
	}
	must(a.add("records", columns))
	must(a.add(bq.Owners, []column{{"pattern", text}, {"team", text}, {"line", number}}))
	return &a
}

// TestViews analyses every view, in order, over the table's schema and the views before
// it. Their columns are what dashboards are built on: ../columns.txt pins them.
func TestViews(t *testing.T) {
	a := newAnalyser(t)
	var got strings.Builder
	for _, v := range bq.Views() {
		columns, err := a.query(v.SQL)
		if err != nil {
			t.Errorf("%s: %v\n%s", v.Name, err, v.SQL)
			continue
		}
		if err := a.add(v.Name, columns); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&got, v.Name)
		if v.Name == "records_unique" {
			fmt.Fprintln(&got, "  the columns of records")
			continue
		}
		for _, c := range columns {
			kind, err := c.kind.(interface {
				TypeName(googlesql.ProductMode) (string, error)
			}).TypeName(googlesql.ProductModeProductExternal)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&got, "  %s %s\n", c.name, kind)
		}
		if strings.HasPrefix(columns[0].name, "$") {
			t.Errorf("%s has a column without a name", v.Name)
		}
	}
	const golden = "../columns.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("columns of views changed (see them with -update):\n%s", got.String())
	}
}

// withViews is an analyser that knows the views too.
func withViews(t *testing.T) *analyser {
	t.Helper()
	a := newAnalyser(t)
	for _, v := range bq.Views() {
		columns, err := a.query(v.SQL)
		if err != nil {
			t.Fatalf("%s: %v", v.Name, err)
		}
		if err := a.add(v.Name, columns); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// TestPanels analyses the query of every panel, with each filter set and with none.
func TestPanels(t *testing.T) {
	a := withViews(t)
	for _, p := range append(panels.All(), panels.Trust(), panels.Bounds()) {
		for _, f := range []panels.Filter{{}, {Repository: "acme/shop", Workflow: "CI*", Image: "alpine:3"}} {
			sql, _ := panels.Parameters(p.SQL, panels.GoogleSQL, f)
			columns, err := a.query(sql)
			if err != nil {
				t.Errorf("%s: %v\n%s", p.ID, err, sql)
				continue
			}
			if len(columns) != len(p.Columns) {
				t.Errorf("%s: %d columns, and %d are described", p.ID, len(columns), len(p.Columns))
				continue
			}
			for i, c := range columns {
				if c.name != p.Columns[i].Name {
					t.Errorf("%s: column %d is %s, and %s is described", p.ID, i, c.name, p.Columns[i].Name)
				}
			}
		}
	}
}

// TestAnalyserRefuses shows that the analyser finds what it is here to find.
func TestAnalyserRefuses(t *testing.T) {
	a := newAnalyser(t)
	for _, sql := range []string{
		"SELECT tss FROM tallyman.records",
		"SELECT ts FROM tallyman.recordss",
		"SELECT ts > 1 FROM tallyman.records",
		"SELECT repository, COUNT(*) FROM tallyman.records",
		"SELECT event.nothing FROM tallyman.records",
	} {
		if _, err := a.query(sql); err == nil {
			t.Errorf("analysed: %s", sql)
		}
	}
}

// TestStatements analyses the statements that make views and tables, and those that
// refresh the tables.
func TestStatements(t *testing.T) {
	a := newAnalyser(t)
	analyse := func(what, sql string) {
		t.Helper()
		if _, err := googlesql.AnalyzeStatement(sql, a.options, a.catalog, a.types); err != nil {
			t.Errorf("%s: %v\n%s", what, err, sql)
		}
	}
	for _, v := range bq.Views() {
		analyse("the statement that makes "+v.Name, v.DDL(project, dataset, 90*24*time.Hour))
		columns, err := a.query(v.SQL)
		if err != nil {
			t.Fatalf("%s: %v", v.Name, err)
		}
		if err := a.add(v.Name, columns); err != nil {
			t.Fatal(err)
		}
	}
	for _, sql := range bq.RefreshSQL(project, dataset) {
		analyse("the refresh", sql)
	}
}

// TestSums analyses all SQL once more, from the list that package analysed keeps, and
// compares what it took with analysed.sum, by which the usual tests know that nothing
// changed since.
func TestSums(t *testing.T) {
	a := withViews(t)
	for _, s := range analysed.Statements() {
		if _, err := googlesql.AnalyzeStatement(s.SQL, a.options, a.catalog, a.types); err != nil {
			t.Errorf("%s: %v\n%s", s.Name, err, s.SQL)
		}
	}
	const file = "analysed.sum"
	got := strings.Join(analysed.Sums(), "\n") + "\n"
	if *update && !t.Failed() {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is of other SQL (make sql UPDATE=1)", file)
	}
}
