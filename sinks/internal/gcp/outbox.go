package gcp

import (
	"fmt"
	"slices"

	"google.golang.org/grpc/status"

	"github.com/tallyman-ci/tallyman/sinks"
)

// Item is a record of a batch in the form that the server wants.
type Item[M any] struct {
	Index int // in the batch
	M     M
}

// Outbox is what is left to hand over of a batch. It remembers between two attempts
// at the same batch what the server took, so that only an answer that got lost makes
// a record come twice.
//
// These servers refuse a request as a whole when one record in it is wrong, and
// often do not say which. Then the request is cut in halves until the record stands
// alone. A record that is refused alone is refused for good, but for one doubt: as
// long as the server has not taken anything, the fault may be the configuration's (a
// topic with a schema, for example), and no record goes to quarantine for that.
type Outbox[M any] struct {
	Advice Advice

	first, last string // ids, and the length of the batch
	n           int

	todo    []Item[M]
	doubted []doubt[M] // refused alone, as yet without proof that others are taken
	refused []sinks.Refused
	limit   int  // of records in a request, while one of them is sought
	taken   bool // the server took something since the start
}

type doubt[M any] struct {
	item Item[M]
	err  error
}

// doubts is how many records may be refused in a row, while none was ever taken,
// before the sink believes in a fault of the configuration.
const doubts = 4

// Begin tells whether batch is another than before. Then the caller fills the box
// with Add and Refuse.
func (o *Outbox[M]) Begin(batch []sinks.Entry) bool {
	first, last := "", ""
	if len(batch) > 0 {
		first, last = batch[0].ID, batch[len(batch)-1].ID
	}
	if o.n == len(batch) && o.n > 0 && o.first == first && o.last == last {
		return false
	}
	o.reset()
	o.first, o.last, o.n = first, last, len(batch)
	return true
}

func (o *Outbox[M]) reset() {
	clear(o.todo)
	clear(o.doubted)
	o.todo, o.doubted, o.refused = o.todo[:0], o.doubted[:0], nil
	o.first, o.last, o.n, o.limit = "", "", 0, 0
}

// Add puts a record into the box.
func (o *Outbox[M]) Add(index int, m M) { o.todo = append(o.todo, Item[M]{index, m}) }

// Refuse notes a record that will not be sent.
func (o *Outbox[M]) Refuse(index int, reason string) {
	o.refused = append(o.refused, sinks.Refused{Index: index, Reason: reason})
}

// Answer is what became of a request.
type Answer struct {
	// Err is the server's error for the whole request, or nil.
	Err error
	// Partial says that the request was taken but for the records that Each names, by
	// their place in the request.
	Partial bool
	Each    map[int]*status.Status
}

// Send empties the box. fits says how many of the items make one request, at least
// one; send sends them. The error is one for Sink.Write.
func (o *Outbox[M]) Send(fits func([]Item[M]) int, send func([]Item[M]) Answer) error {
	for len(o.todo) > 0 {
		n := fits(o.todo)
		if o.limit > 0 {
			n = min(n, o.limit)
		}
		switch a := send(o.todo[:n]); {
		case a.Err == nil:
			o.taken = true
			o.drop(n)
		case a.Partial:
			if err := o.partial(n, a.Each); err != nil {
				return err
			}
		case !invalid(a.Err):
			o.giveBack()
			return o.Advice.Explain(a.Err)
		case n > 1:
			o.limit = n / 2
		default:
			o.doubted = append(o.doubted, doubt[M]{o.todo[0], a.Err})
			o.drop(1)
			if !o.taken && len(o.doubted) >= doubts {
				return o.giveUp()
			}
		}
	}
	if len(o.doubted) > 0 && !o.taken {
		return o.giveUp()
	}
	for _, d := range o.doubted {
		st, _ := status.FromError(d.err)
		o.Refuse(d.item.Index, fmt.Sprintf("%s: %s", st.Code(), st.Message()))
	}
	refused := o.refused
	o.reset()
	if len(refused) > 0 {
		return &sinks.RefusedError{Refused: refused}
	}
	return nil
}

func (o *Outbox[M]) drop(n int) {
	o.todo = slices.Delete(o.todo, 0, n)
	o.limit *= 2 // the one that was sought may be behind us
}

// partial books a request of which the server took all but some.
func (o *Outbox[M]) partial(n int, each map[int]*status.Status) error {
	var again []Item[M]
	var why error
	for i, item := range o.todo[:n] {
		switch st := each[i]; {
		case st == nil:
			o.taken = true
		case invalid(st.Err()):
			o.doubted = append(o.doubted, doubt[M]{item, st.Err()})
		default: // a permission, for example: that is not the record's fault
			again, why = append(again, item), st.Err()
		}
	}
	o.drop(n)
	if why == nil {
		return nil
	}
	o.todo = append(again, o.todo...)
	o.giveBack()
	return o.Advice.Explain(why)
}

// giveBack puts the doubted records to those that come again.
func (o *Outbox[M]) giveBack() {
	var again []Item[M]
	for _, d := range o.doubted {
		again = append(again, d.item)
	}
	o.todo = append(again, o.todo...)
	clear(o.doubted)
	o.doubted = o.doubted[:0]
}

func (o *Outbox[M]) giveUp() error {
	why := o.doubted[0].err
	o.giveBack()
	o.limit = 0
	return o.Advice.Explain(why)
}

// Sort orders the items that were added; equal ones keep their order.
func (o *Outbox[M]) Sort(compare func(a, b M) int) {
	slices.SortStableFunc(o.todo, func(a, b Item[M]) int { return compare(a.M, b.M) })
}
