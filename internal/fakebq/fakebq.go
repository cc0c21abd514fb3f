// Package fakebq is a server of the part of BigQuery's REST API that package apply uses, for
// tests: data sets and tables with etags, and the rules by which BigQuery refuses a schema's
// change. It has no data and no queries, takes any text for a view's query, and asks
// for no credentials. The refusals follow
// https://cloud.google.com/bigquery/docs/managing-table-schemas and are written apart from those in
// package bq, which they test.
package fakebq

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
)

// Server is one BigQuery. Fail, where set, is asked before each request; a status other
// than 0 is the answer. Both may be set between requests only.
type Server struct {
	*httptest.Server
	Fail func(method, path string) (status int, message string)
	// Denied are permissions that the caller has not.
	Denied []string

	mu       sync.Mutex
	datasets map[string]object
	tables   map[string]object // by data set and name
	policies map[string]object
	writes   []string
	changes  int
}

type object = map[string]any

// New starts a server on a free port of this machine.
func New() *Server {
	s := &Server{datasets: map[string]object{}, tables: map[string]object{}, policies: map[string]object{}}
	mux := http.NewServeMux()
	const root = "/bigquery/v2/projects/{project}/datasets"
	mux.HandleFunc("POST "+root, s.insertDataset)
	mux.HandleFunc("GET "+root+"/{dataset}", s.getDataset)
	mux.HandleFunc("POST "+root+"/{dataset}/tables", s.insertTable)
	mux.HandleFunc("GET "+root+"/{dataset}/tables/{table}", s.getTable)
	mux.HandleFunc("PATCH "+root+"/{dataset}/tables/{table}", s.patchTable)
	mux.HandleFunc("POST "+root+"/{dataset}/tables/{table}", s.iam) // :getIamPolicy, :testIamPermissions
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.Fail != nil {
			if status, message := s.Fail(r.Method, r.URL.Path); status != 0 {
				refuse(w, status, "%s", message)
				return
			}
		}
		if r.Method != http.MethodGet && !strings.Contains(r.URL.Path, "IamP") {
			s.writes = append(s.writes, r.Method+" "+strings.TrimPrefix(r.URL.Path, "/bigquery/v2"))
		}
		mux.ServeHTTP(w, r)
	}))
	return s
}

// Writes returns the requests that were to change something, since the last call.
func (s *Server) Writes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.writes
	s.writes = nil
	return out
}

// Table returns a table as BigQuery would show it, or nil.
func (s *Server) Table(dataset, name string) map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tables[dataset+"."+name]
}

// Edit changes a table behind the client's back.
func (s *Server) Edit(dataset, name string, change func(map[string]any)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.tables[dataset+"."+name])
	s.touch(s.tables[dataset+"."+name])
}

// Bind grants a role on a table.
func (s *Server) Bind(dataset, table, role, member string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := dataset + "." + table
	bindings, _ := s.policies[key]["bindings"].([]any)
	s.policies[key] = object{"bindings": append(bindings, object{"role": role, "members": []any{member}})}
}

// Share grants a role on all of a data set, in the words of its access list.
func (s *Server) Share(dataset, role, email string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	access, _ := s.datasets[dataset]["access"].([]any)
	s.datasets[dataset]["access"] = append(access, object{"role": role, "userByEmail": email})
}

func (s *Server) touch(o object) {
	s.changes++
	o["etag"] = fmt.Sprintf("etag-%d", s.changes)
}

func refuse(w http.ResponseWriter, status int, format string, args ...any) {
	message := fmt.Sprintf(format, args...)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(object{"error": object{"code": status, "message": message, "errors": []any{object{"message": message}}}})
}

func answer(w http.ResponseWriter, o object) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(o)
}

func body(w http.ResponseWriter, r *http.Request) (object, bool) {
	var o object
	if err := json.NewDecoder(r.Body).Decode(&o); err != nil {
		refuse(w, http.StatusBadRequest, "Invalid JSON payload: %v", err)
		return nil, false
	}
	return o, true
}

func text(o object, path ...string) string {
	for _, name := range path[:len(path)-1] {
		o, _ = o[name].(object)
	}
	s, _ := o[path[len(path)-1]].(string)
	return s
}

func (s *Server) insertDataset(w http.ResponseWriter, r *http.Request) {
	o, ok := body(w, r)
	if !ok {
		return
	}
	name := text(o, "datasetReference", "datasetId")
	switch {
	case name == "":
		refuse(w, http.StatusBadRequest, "Required parameter is missing: datasetReference.datasetId")
	case s.datasets[name] != nil:
		refuse(w, http.StatusConflict, "Already Exists: Dataset %s:%s", r.PathValue("project"), name)
	default:
		s.touch(o)
		s.datasets[name] = o
		answer(w, o)
	}
}

func (s *Server) getDataset(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("dataset")
	if s.datasets[name] == nil {
		refuse(w, http.StatusNotFound, "Not found: Dataset %s:%s", r.PathValue("project"), name)
		return
	}
	answer(w, s.datasets[name])
}

func (s *Server) insertTable(w http.ResponseWriter, r *http.Request) {
	o, ok := body(w, r)
	if !ok {
		return
	}
	dataset, name := r.PathValue("dataset"), text(o, "tableReference", "tableId")
	view, isView := o["view"].(object)
	switch {
	case s.datasets[dataset] == nil:
		refuse(w, http.StatusNotFound, "Not found: Dataset %s:%s", r.PathValue("project"), dataset)
		return
	case s.tables[dataset+"."+name] != nil:
		refuse(w, http.StatusConflict, "Already Exists: Table %s:%s.%s", r.PathValue("project"), dataset, name)
		return
	case isView:
		if legacy, set := view["useLegacySql"].(bool); !set || legacy {
			refuse(w, http.StatusBadRequest, "a query of legacy SQL")
			return
		}
		o["type"] = "VIEW"
	default:
		if message := newTable(o); message != "" {
			refuse(w, http.StatusBadRequest, "%s", message)
			return
		}
		o["type"] = "TABLE"
		plain(columns(o))
	}
	s.touch(o)
	s.tables[dataset+"."+name] = o
	answer(w, o)
}

// plain writes columns as the API answers with them: a mode that is NULLABLE is there, and types have
// the names of legacy SQL.
func plain(fields []any) {
	for _, f := range fields {
		f := f.(object)
		if f["mode"] == nil {
			f["mode"] = "NULLABLE"
		}
		plain(sub(f))
	}
}

func columns(table object) []any {
	schema, _ := table["schema"].(object)
	fields, _ := schema["fields"].([]any)
	return fields
}

func sub(field object) []any {
	fields, _ := field["fields"].([]any)
	return fields
}

func find(fields []any, name string) object {
	for _, f := range fields {
		if strings.EqualFold(text(f.(object), "name"), name) {
			return f.(object)
		}
	}
	return nil
}

func newTable(o object) string {
	partitioning, _ := o["timePartitioning"].(object)
	if field := text(o, "timePartitioning", "field"); partitioning != nil {
		c := find(columns(o), field)
		if t := text(c, "type"); t != "TIMESTAMP" && t != "DATE" {
			return "The field specified for time partitioning must be a top-level TIMESTAMP or DATE: " + field
		}
	}
	clustering, _ := o["clustering"].(object)
	names, _ := clustering["fields"].([]any)
	if len(names) > 4 {
		return "Too many clustering fields"
	}
	for _, n := range names {
		if c := find(columns(o), n.(string)); c == nil || text(c, "mode") == "REPEATED" || text(c, "type") == "RECORD" {
			return "The field specified for clustering cannot be used: " + n.(string)
		}
	}
	if require, _ := o["requirePartitionFilter"].(bool); require && partitioning == nil {
		return "require_partition_filter wants a partitioned table"
	}
	if len(columns(o)) == 0 {
		return "a table without columns"
	}
	return ""
}

func (s *Server) getTable(w http.ResponseWriter, r *http.Request) {
	dataset, name := r.PathValue("dataset"), r.PathValue("table")
	if s.tables[dataset+"."+name] == nil {
		refuse(w, http.StatusNotFound, "Not found: Table %s:%s.%s", r.PathValue("project"), dataset, name)
		return
	}
	answer(w, s.tables[dataset+"."+name])
}

func (s *Server) patchTable(w http.ResponseWriter, r *http.Request) {
	key := r.PathValue("dataset") + "." + r.PathValue("table")
	have := s.tables[key]
	change, ok := body(w, r)
	switch {
	case !ok:
		return
	case have == nil:
		refuse(w, http.StatusNotFound, "Not found: Table %s:%s", r.PathValue("project"), key)
		return
	case r.Header.Get("If-Match") != "" && r.Header.Get("If-Match") != have["etag"]:
		refuse(w, http.StatusPreconditionFailed, "Precondition Failed")
		return
	}
	if change["schema"] != nil {
		if message := evolves(columns(have), columns(change), ""); message != "" {
			refuse(w, http.StatusBadRequest, "Provided Schema does not match Table %s:%s. %s", r.PathValue("project"), key, message)
			return
		}
		plain(columns(change))
	}
	if tp, ok := change["timePartitioning"].(object); ok && (text(tp, "field") != text(have, "timePartitioning", "field") || text(tp, "type") != text(have, "timePartitioning", "type")) {
		refuse(w, http.StatusBadRequest, "Cannot change partitioning/clustering spec for a partitioned/clustered table.")
		return
	}
	merged := maps.Clone(have)
	for name, value := range change {
		if merged[name] = value; value == nil {
			delete(merged, name)
		}
	}
	s.touch(merged)
	s.tables[key] = merged
	answer(w, merged)
}

// evolves says why a table with have cannot have want, or nothing.
func evolves(have, want []any, prefix string) string {
	for i, h := range have {
		h := h.(object)
		path := prefix + text(h, "name")
		w := find(want, text(h, "name"))
		switch {
		case w == nil:
			return "Field " + path + " is missing in new schema"
		case !slices.ContainsFunc(want[:i+1], func(x any) bool { return text(x.(object), "name") == text(h, "name") }):
			return "Field " + path + " has moved"
		case text(w, "type") != text(h, "type"):
			return fmt.Sprintf("Field %s has changed type from %s to %s", path, text(h, "type"), text(w, "type"))
		case text(w, "mode") != text(h, "mode") && !(text(h, "mode") == "REQUIRED" && text(w, "mode") == "NULLABLE"):
			return fmt.Sprintf("Field %s has changed mode from %s to %s", path, text(h, "mode"), text(w, "mode"))
		}
		if message := evolves(sub(h), sub(w), path+"."); message != "" {
			return message
		}
	}
	for _, w := range want {
		if w := w.(object); find(have, text(w, "name")) == nil && text(w, "mode") == "REQUIRED" {
			return "Cannot add required fields to an existing schema. (field: " + prefix + text(w, "name") + ")"
		}
	}
	return ""
}

func (s *Server) iam(w http.ResponseWriter, r *http.Request) {
	name, verb, _ := strings.Cut(r.PathValue("table"), ":")
	key := r.PathValue("dataset") + "." + name
	o, ok := body(w, r)
	switch {
	case !ok:
	case s.tables[key] == nil:
		refuse(w, http.StatusNotFound, "Not found: Table %s:%s", r.PathValue("project"), key)
	case verb == "getIamPolicy":
		answer(w, object{"etag": "e", "bindings": s.policies[key]["bindings"]})
	case verb == "testIamPermissions":
		asked, _ := o["permissions"].([]any)
		granted := slices.DeleteFunc(asked, func(p any) bool { return slices.Contains(s.Denied, p.(string)) })
		answer(w, object{"permissions": granted})
	default:
		refuse(w, http.StatusNotFound, "no method %s", verb)
	}
}
