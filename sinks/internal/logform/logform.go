// Package logform is what a record looks like as an entry of a log: its severity, a
// line for people, and the labels by which entries are found.
package logform

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tallyman-ci/tallyman/record"
	"github.com/tallyman-ci/tallyman/sinks/row"
)

// The severities that records have
// (https://cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry#LogSeverity).
const (
	Info    = "INFO"
	Warning = "WARNING"
)

// Severity is Warning for what somebody may want to look at: a command or a
// container that failed, and records that are missing.
func Severity(r *record.Record) string {
	failed := func(code *int64) bool { return code != nil && *code != 0 }
	switch {
	case r.Loss != nil,
		r.Invocation != nil && r.Invocation.ExecError != "",
		r.End != nil && (failed(r.End.ExitCode) || r.End.Signal != 0),
		// exec_die is left out: a health check that fails while a service starts is no news.
		r.Event != nil && r.Event.Type == "container" && r.Event.Action == "die" && failed(r.Event.ExitCode),
		r.Event != nil && (r.Event.OOM || r.Event.Action == "oom"):
		return Warning
	}
	return Info
}

// maxMessage bounds the line for people, in bytes.
const maxMessage = 300

// Message is a line for people.
func Message(r *record.Record) string {
	var b strings.Builder
	word := func(words ...string) {
		for _, w := range words {
			if w == "" {
				continue
			}
			if b.Len() > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(w)
		}
	}
	took := func(ns int64) {
		if ns > 0 {
			word("after", time.Duration(ns).Round(time.Millisecond).String())
		}
	}
	exit := func(code *int64) {
		if code != nil {
			word("with exit code", strconv.FormatInt(*code, 10))
		}
	}
	switch {
	case r.Invocation != nil:
		word(r.Invocation.Tool, r.Invocation.Command)
		word(r.Invocation.Images...)
		if r.Invocation.ExecError != "" {
			word("could not be started:", r.Invocation.ExecError)
		}
	case r.End != nil:
		word(r.End.Tool, r.End.Command)
		word(r.End.Images...)
		word("ended")
		exit(r.End.ExitCode)
		if r.End.Signal != 0 {
			word("by signal", strconv.FormatInt(r.End.Signal, 10))
		}
		took(r.End.DurationNS)
	case r.Event != nil:
		word(r.Event.Type, r.Event.Action, r.Event.Detail, r.Event.Image)
		exit(r.Event.ExitCode)
		took(r.Event.DurationNS)
	case r.Loss != nil:
		if r.Loss.Count < 0 {
			word("records are missing, how many is not known:", r.Loss.Cause)
		} else {
			word(strconv.FormatInt(r.Loss.Count, 10), "records are missing:", r.Loss.Cause)
		}
	case r.Job != nil && r.Kind == record.KindJobEnd:
		word("job ended:", r.Job.Outcome)
		took(r.Job.DurationNS)
	case r.Job != nil:
		word("job started")
	default:
		word(string(r.Kind))
	}
	return cut(b.String(), maxMessage)
}

// Label is one label of an entry.
type Label struct{ Key, Value string }

// maxLabel bounds a label's value, in bytes; Cloud Logging's own bound is 64 KB.
const maxLabel = 256

// Labels are what entries are looked for by. Empty ones are left out.
func Labels(r *record.Record, truncated bool) []Label {
	var labels []Label
	add := func(key, value string) {
		if value != "" {
			labels = append(labels, Label{key, cut(value, maxLabel)})
		}
	}
	add("kind", string(r.Kind))
	if ci := r.CI; ci != nil {
		add("repository", ci.Repository)
		add("workflow", ci.Workflow)
		add("job", ci.Job)
		add("run_id", ci.RunID)
		if ci.Runner != nil {
			add("runner", ci.Runner.Name)
		}
	}
	if truncated {
		add("truncated", "true")
	}
	return labels
}

// Shrink cuts the long strings and lists of r until it is a row of at most max bytes, and
// tells whether it had to. The id stays whole.
func Shrink(r *record.Record, max int) (data []byte, truncated bool, err error) {
	if data, err = row.Append(nil, r); err != nil || len(data) <= max {
		return data, false, err
	}
	id := r.ID
	for _, to := range []struct{ text, list int }{{4096, 256}, {1024, 64}, {256, 16}, {64, 4}} {
		shorten(reflect.ValueOf(r).Elem(), to.text, to.list)
		r.ID = id
		if r.Invocation != nil {
			r.Invocation.Truncated = true
		}
		if data, err = row.Append(data[:0], r); err != nil || len(data) <= max {
			return data, true, err
		}
	}
	return data, true, fmt.Errorf("the record has %d bytes when all of it is cut short; %d are wanted", len(data), max)
}

func shorten(v reflect.Value, text, list int) {
	switch v.Kind() {
	case reflect.String:
		if v.Len() > text {
			v.SetString(cut(v.String(), text))
		}
	case reflect.Pointer:
		if !v.IsNil() {
			shorten(v.Elem(), text, list)
		}
	case reflect.Slice:
		if v.Len() > list {
			v.SetLen(list)
		}
		for i := range v.Len() {
			shorten(v.Index(i), text, list)
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			shorten(v.Field(i), text, list)
		}
	}
}

// maxLine is below the 16 KiB at which containerd cuts a line of a container's
// output in two, of which neither is JSON any more.
const maxLine = 16<<10 - 256

// AppendGKE appends r as one line, without a newline, that the logging agent of
// Google Kubernetes Engine takes for a structured entry. It takes its own members out
// (https://cloud.google.com/logging/docs/structured-logging#special-payload-fields);
// message and the members of the row are the jsonPayload. r may be cut short by it.
func AppendGKE(dst []byte, r *record.Record) ([]byte, error) {
	start := len(dst)
	dst = append(append(append(dst, `{"severity":"`...), Severity(r)...), `","time":"`...)
	dst = append(r.TS.UTC().AppendFormat(dst, time.RFC3339Nano), `","message":`...)
	dst = append(record.AppendString(dst, Message(r)), `,"logging.googleapis.com/insertId":`...)
	dst = append(record.AppendString(dst, r.ID), `,"logging.googleapis.com/labels":{`...)
	for i, l := range Labels(r, false) {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = record.AppendString(append(record.AppendString(dst, l.Key), ':'), l.Value)
	}
	// What is written counts as it is: a byte of a job's word can be six here.
	const truncatedLabel = `,"truncated":"true"` // there is a label before it: each record has a kind
	data, truncated, err := Shrink(r, maxLine-(len(dst)-start)-len(truncatedLabel)-len(`},`))
	if err != nil {
		return dst[:start], err
	}
	if truncated {
		dst = append(dst, truncatedLabel...)
	}
	return append(append(dst, `},`...), data[1:]...), nil
}

// cut is the first max bytes of s or less, without a torn character.
func cut(s string, max int) string {
	if len(s) <= max {
		return s
	}
	for max > 0 && !utf8.RuneStart(s[max]) {
		max--
	}
	return s[:max]
}
