package importer

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// field is what a column can mean.
type field int

const (
	fTime field = iota
	fDate
	fMethod
	fURL
	fHost
	fPath
	fStatus
	fUserAgent
	fBytes
	fDuration
	fAddr
	fUser
	fAnonymous
	fAuthenticated
	fToken
	fRepository
	fImage
	fTag
	fDigest
	fPulls
	fChecks
	fCount
	fRequestID
	fields
)

// names are the fields by the names under which Options.Columns knows them, each with
// the headings that mean it, reduced by reduce; the first found counts.
var names = [fields]struct {
	name     string
	headings string
}{
	fTime:          {"time", "timestamp ts time datetime datehour hour createdat created eventtime requesttime requestedat requesttimestamp requesttimeutc timestamputc timeutc utctime occurredat loggedat starttime startedat when dateutc datetimeutc epoch unixtime timestampms timems attimestamp timeiso8601 receivedat"},
	fDate:          {"date", "date day requestdate"},
	fMethod:        {"method", "method httpmethod requestmethod verb httpverb httprequestmethod"},
	fURL:           {"url", "url requesturl fullurl requesturi uri request httpurl urlfull requestline httprequest endpoint requesturlfull"},
	fHost:          {"host", "host hostname requesthost httphost server serverhost domain vhost urldomain"},
	fPath:          {"path", "path requestpath urlpath pathname uripath httppath requestedpath route"},
	fStatus:        {"status", "status statuscode httpstatus httpstatuscode responsestatus responsecode responsestatuscode code httpcode httpresponsecode httpresponsestatuscode"},
	fUserAgent:     {"user_agent", "useragent ua httpuseragent requestuseragent agent useragentoriginal requestheadersuseragent clientuseragent"},
	fBytes:         {"bytes", "contentlength bytes bytessent responsebytes responsesize bodybytes bodybytessent size responsecontentlength transferredbytes responsebodysize contentlengthbytes bytesout"},
	fDuration:      {"duration", "duration durationms elapsedms latencyms responsetimems latency elapsed durationseconds durations responsetime"},
	fAddr:          {"remote_addr", "address ip ipaddress remoteaddr remoteaddress remoteip clientip clientaddress clientipaddress sourceip sourceaddress srcip ips actorip requestip xforwardedfor ipaddresses originip"},
	fUser:          {"user", "user username login actor userlogin account dockerid currentuser actorlogin"},
	fAnonymous:     {"anonymous", "anonymous isanonymous anon unauthenticated"},
	fAuthenticated: {"authenticated", "authenticated isauthenticated loggedin auth"},
	// Never a heading such as token: its column may hold tokens.
	fToken:      {"token_name", "tokenname accesstokenname patname"},
	fRepository: {"repository", "repository repo reponame repositoryname nwo fullname repositoryfullname repositorynwo"},
	fImage:      {"image", "image imagename imagerepository"},
	fTag:        {"tag", "tag imagetag reference"},
	fDigest:     {"digest", "digest imagedigest manifestdigest sha256"},
	fPulls:      {"pulls", "pulls pullcount pull"},
	fChecks:     {"version_checks", "versionchecks versioncheck versioncheckcount checks"},
	fCount:      {"count", "count requests requestcount hits numrequests"},
	fRequestID:  {"request_id", "requestid githubrequestid xgithubrequestid reqid ghrequestid"},
}

func fieldOf(name string) field {
	for f := range fields {
		if names[f].name == name {
			return f
		}
	}
	return fields
}

func isField(name string) bool { return fieldOf(name) < fields }

func fieldList() string { return strings.Join(Fields(), ", ") }

// Fields are the names that Options.Columns may use.
func Fields() []string {
	list := make([]string, fields)
	for f := range fields {
		list[f] = names[f].name
	}
	return list
}

// reduce makes one form of all spellings of a heading: Request Time (UTC), request_time
// and RequestTime.
func reduce(heading string) string {
	var b strings.Builder
	if rest, ok := strings.CutPrefix(strings.TrimSpace(heading), "@"); ok {
		b.WriteString("at")
		heading = rest
	}
	for _, c := range strings.ToLower(heading) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c > 0x7f {
			b.WriteRune(c)
		}
	}
	return b.String()
}

// column gives the cell of a field.
type column struct {
	index int    // of a cell
	path  string // of a member
	name  string // for people
	scale string // of a duration: ms, s or ""
}

func (c column) of(r *row) string {
	if r.get != nil {
		v, _ := r.get(c.path)
		return strings.TrimSpace(v)
	}
	if c.index < len(r.cells) {
		return strings.TrimSpace(r.cells[c.index])
	}
	return ""
}

// layout finds out which column is which: what the caller says first, then by the
// headings, then by what the cells hold.
func (x *table) layout() error {
	x.cells = map[field]column{}
	x.times = timeParser{loc: x.o.Location}
	var heads []string
	named := true
	skipped := 0
	if x.o.Format == JSONL {
		seen := map[string]bool{}
		for _, p := range x.pending {
			for _, name := range p.row.cells {
				if !seen[name] {
					seen[name] = true
					heads = append(heads, name)
				}
			}
		}
		slices.Sort(heads)
	} else {
		heads, skipped, named = x.heading()
	}
	column := func(i int) column {
		c := column{index: i, path: heads[i], name: heads[i]}
		if !named {
			c.name = "#" + strconv.Itoa(i+1)
		}
		if r := reduce(heads[i]); named && (strings.HasSuffix(r, "ms") || strings.HasSuffix(r, "millis")) {
			c.scale = "ms"
		} else if named && (strings.HasSuffix(r, "seconds") || r == "durations") {
			c.scale = "s"
		}
		return c
	}
	taken := map[int]bool{}
	silent := map[field]bool{}
	for name, head := range x.o.Columns {
		f := fieldOf(name)
		if silent[f] = true; head == "" {
			continue
		}
		at := -1
		if n, err := strconv.Atoi(strings.TrimPrefix(head, "#")); err == nil && strings.HasPrefix(head, "#") && x.o.Format != JSONL {
			at = n - 1
		} else if named {
			if at = slices.Index(heads, head); at < 0 {
				at = slices.IndexFunc(heads, func(h string) bool { return reduce(h) == reduce(head) })
			}
		}
		if at < 0 && x.o.Format == JSONL {
			// A member that the first rows do not have.
			heads = append(heads, head)
			at = len(heads) - 1
		}
		if at < 0 || at >= len(heads) {
			return fmt.Errorf("%w: no column is called %s (--column %s=...); there are %s", ErrLayout, strconv.Quote(x.safe.text(head)), name, x.listing(heads, named))
		}
		x.cells[f], taken[at] = column(at), true
	}
	if named {
		for f := range fields {
			if silent[f] {
				continue
			}
			for _, want := range strings.Fields(names[f].headings) {
				at := slices.IndexFunc(heads, func(h string) bool {
					r := reduce(h)
					return r == want || x.o.Format == JSONL && strings.Contains(h, ".") && reduce(h[strings.LastIndexByte(h, '.')+1:]) == want
				})
				if at >= 0 && !taken[at] {
					x.cells[f], taken[at] = column(at), true
					break
				}
			}
		}
	}
	x.byContent(heads, column, taken, silent)
	if err := x.settle(); err != nil {
		return fmt.Errorf("%w; there are %s", err, x.listing(heads, named))
	}
	if x.o.Format != JSONL {
		for _, c := range x.cells {
			x.width = max(x.width, c.index+1)
		}
		if named {
			x.heads = len(heads)
		}
	}
	if x.o.OnLayout != nil {
		l := Layout{Columns: map[string]string{}, Skipped: skipped, TimeFormat: x.times.name()}
		if c, ok := x.rows.(*csvRows); ok {
			l.Delimiter = c.delimiter
		}
		for f, c := range x.cells {
			l.Columns[names[f].name] = x.safe.text(c.name)
		}
		for i, h := range heads {
			if !taken[i] && named {
				l.Ignored = append(l.Ignored, x.safe.text(h))
			}
		}
		x.o.OnLayout(l)
	}
	return nil
}

// listing names the columns there are, for an error.
func (x *table) listing(heads []string, named bool) string {
	if len(heads) == 0 {
		return "no columns"
	}
	if !named {
		return "columns without headings, #1 to #" + strconv.Itoa(len(heads))
	}
	var list []string
	for _, h := range heads[:min(len(heads), 40)] {
		list = append(list, strconv.Quote(x.safe.text(h)))
	}
	return strings.Join(list, ", ")
}

// heading takes the heading off the pending rows, and what stands before it. Where there
// is none, heads are empty names for as many columns as there are.
func (x *table) heading() (heads []string, skipped int, named bool) {
	known := map[string]bool{}
	for f := range fields {
		for _, h := range strings.Fields(names[f].headings) {
			known[h] = true
		}
	}
	for _, h := range x.o.Columns {
		if h != "" && !strings.HasPrefix(h, "#") {
			known[reduce(h)] = true
		}
	}
	for i, p := range x.pending[:min(len(x.pending), 10)] {
		if p.err != nil {
			continue
		}
		hits := 0
		for _, c := range p.row.cells {
			if known[reduce(c)] {
				hits++
			}
		}
		if hits >= 2 || hits == 1 && len(p.row.cells) <= 2 {
			heads = make([]string, len(p.row.cells))
			for j, c := range p.row.cells {
				heads[j] = strings.TrimSpace(c)
			}
			x.pending = x.pending[i+1:]
			return heads, i, true
		}
	}
	// Headings in words that nobody knows: a first row in which no cell looks like data.
	if len(x.pending) > 0 && x.pending[0].err == nil && len(x.pending[0].row.cells) > 1 && !looksLikeData(x.pending[0].row.cells) {
		for _, c := range x.pending[0].row.cells {
			heads = append(heads, strings.TrimSpace(c))
		}
		x.pending = x.pending[1:]
		return heads, 0, true
	}
	width := 0
	for _, p := range x.pending {
		width = max(width, len(p.row.cells))
	}
	return make([]string, width), 0, false
}

func looksLikeData(cells []string) bool {
	return slices.ContainsFunc(cells, func(c string) bool {
		c = strings.TrimSpace(c)
		return isTime(c) || isAddr(c) || isMethod(c) || isURL(c) || isNumber(c)
	})
}

func isNumber(s string) bool { _, err := strconv.ParseFloat(s, 64); return err == nil }

func isAddr(s string) bool { _, err := netip.ParseAddr(s); return err == nil }

func isURL(s string) bool {
	return strings.Contains(s, "://") || strings.HasPrefix(s, "/") && len(s) > 1
}

func isMethod(s string) bool {
	switch strings.ToUpper(s) {
	case "GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE", "PROPFIND":
		return true
	}
	return false
}

func isAgent(s string) bool {
	name, rest, ok := strings.Cut(s, "/")
	return ok && len(name) > 1 && !strings.ContainsAny(name, " :.?") && rest != "" && rest[0] >= '0' && rest[0] <= '9'
}

func isStatus(s string) bool {
	n, err := strconv.Atoi(s)
	return err == nil && n >= 100 && n < 600 && len(s) == 3
}

// byContent gives fields that no heading named to columns that no field has, if nearly
// all of their cells look like it. The sure looks come first.
func (x *table) byContent(heads []string, column func(int) column, taken map[int]bool, silent map[field]bool) {
	for _, look := range []struct {
		f  field
		is func(string) bool
	}{{fTime, isTime}, {fAddr, isAddr}, {fMethod, isMethod}, {fURL, isURL}, {fStatus, isStatus}, {fUserAgent, isAgent}} {
		if _, found := x.cells[look.f]; found || silent[look.f] {
			continue
		}
		if look.f == fURL {
			if _, found := x.cells[fPath]; found {
				continue
			}
		}
		for i := range heads {
			if taken[i] {
				continue
			}
			c := column(i)
			yes, cells := 0, 0
			for _, p := range x.pending {
				if p.err != nil {
					continue
				}
				if v := c.of(&p.row); v != "" && v != "-" {
					if cells++; look.is(v) {
						yes++
					}
				}
			}
			if yes > 0 && yes*10 >= cells*9 {
				x.cells[look.f], taken[i] = c, true
				break
			}
		}
	}
}

// settle checks that what is needed is there, and finds out the form of the times.
func (x *table) settle() error {
	_, hasTime := x.cells[fTime]
	date, hasDate := x.cells[fDate]
	if !hasTime && hasDate { // a column called date that holds the time as well
		x.cells[fTime] = date
		delete(x.cells, fDate)
		hasTime = true
	}
	switch {
	case len(x.pending) == 0 && len(x.cells) == 0:
		return nil // an empty file
	case !hasTime:
		return fmt.Errorf("%w: no column holds the time (say --column time=HEADING)", ErrLayout)
	case x.o.Format == DockerHubCSV && !x.has(fRepository) && !x.has(fImage):
		return fmt.Errorf("%w: no column holds the repository (say --column repository=HEADING)", ErrLayout)
	case x.o.Format == DockerHubCSV && !x.has(fPulls) && !x.has(fChecks):
		return fmt.Errorf("%w: no column holds pulls or version checks (say --column pulls=HEADING)", ErrLayout)
	case x.o.Format == GitHubCSV && !x.has(fURL) && !x.has(fPath) && !x.has(fStatus) && !x.has(fUserAgent) && !x.has(fRepository):
		return fmt.Errorf("%w: no column holds URL, path, status, user agent or repository: is it a request table?", ErrLayout)
	}
	var sample []string
	for _, p := range x.pending {
		if p.err == nil {
			sample = append(sample, x.timeText(&p.row))
		}
	}
	return x.times.choose(x.o.TimeFormat, sample)
}

func (x *table) has(f field) bool { _, ok := x.cells[f]; return ok }

func (x *table) timeText(r *row) string {
	t := x.cells[fTime].of(r)
	if d, ok := x.cells[fDate]; ok {
		if v := d.of(r); v != "" && !isTime(t) {
			return v + " " + t
		}
	}
	return t
}
