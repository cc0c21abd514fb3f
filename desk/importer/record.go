package importer

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/tallyman-ci/tallyman/record"
)

// record makes the record of a row. reason says why the row is bad; it quotes nothing.
func (x *table) record(r *row) (rec *record.Record, reason string) {
	if r.get == nil {
		if len(r.cells) < x.width {
			return nil, fmt.Sprintf("has %d cells, and column %d is wanted", len(r.cells), x.width)
		}
		// More cells than headings: a delimiter inside a cell was not quoted, and what is
		// behind it would be read as something else.
		if n := len(r.cells); x.heads > 0 && n > x.heads && !(n == x.heads+1 && r.cells[n-1] == "") {
			return nil, fmt.Sprintf("has %d cells for %d columns", n, x.heads)
		}
	}
	ts, err := x.times.parse(x.timeText(r))
	if err != nil {
		return nil, err.Error()
	}
	h := &record.HTTP{Source: string(x.o.Format), Row: x.at, Count: 1}
	rec = &record.Record{TS: ts, Kind: record.KindHTTP, Schema: record.SchemaVersion, By: record.ByNone, HTTP: h}
	if reason := x.request(r, h); reason != "" {
		return nil, reason
	}
	if reason := x.counts(r, rec); reason != "" {
		return nil, reason
	}
	rec.ID = record.DeriveID(rec.TS, "http", string(x.o.Format), strconv.FormatInt(x.at, 10), string(r.raw))
	return rec, ""
}

func (x *table) cell(r *row, f field) string {
	c, ok := x.cells[f]
	if !ok {
		return ""
	}
	v := c.of(r)
	switch v {
	case "-", "null", "NULL", "nil", "None", "N/A", "n/a", "(null)", `\N`:
		return ""
	}
	return v
}

// request reads what says what was asked for, by whom, and how it was answered.
func (x *table) request(r *row, h *record.HTTP) string {
	t := x.safe.target(x.cell(r, fURL))
	h.Host, h.Path = t.host, t.path
	if v := x.cell(r, fPath); v != "" {
		p := x.safe.target(v)
		h.Path, t.push = p.path, t.push || p.push
		if h.Host == "" {
			h.Host = p.host
		}
	}
	if v := x.cell(r, fHost); v != "" {
		if host := x.safe.target("//" + strings.TrimPrefix(strings.TrimPrefix(v, "https://"), "http://")); host.host != "" {
			h.Host = host.host
		} else {
			return "the host is no host"
		}
	}
	if h.Host == "" {
		h.Host = x.safe.host(x.o.Host)
	}
	if h.Method = t.method; x.has(fMethod) {
		if v := x.cell(r, fMethod); v != "" {
			if v = strings.ToUpper(v); len(v) > 20 || strings.Trim(v, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-_") != "" {
				return "the method is no word"
			}
			h.Method = x.safe.text(v)
		}
	}
	if v := x.cell(r, fStatus); v != "" {
		word := strings.TrimPrefix(strings.TrimPrefix(v, "HTTP "), "http ")
		word, _, _ = strings.Cut(word, " ")
		n, err := strconv.Atoi(strings.TrimSuffix(word, ".0"))
		if err != nil || n < 100 || n > 599 {
			return "the status is no number from 100 to 599"
		}
		h.Status = int64(n)
	}
	if v := x.cell(r, fBytes); v != "" {
		n, ok := count(v)
		if !ok {
			return "the number of bytes is none"
		}
		h.Bytes = &n
	}
	if v := x.cell(r, fDuration); v != "" {
		d, ok := duration(v, x.cells[fDuration].scale)
		if !ok {
			return "the duration is none"
		}
		h.DurationNS = d
	}
	if v := x.cell(r, fAddr); v != "" {
		addrs, ok := addresses(v)
		if !ok {
			return "the address is no IP address"
		}
		if len(addrs) == 1 {
			h.RemoteAddr = addrs[0]
		} else {
			h.RemoteAddrs = addrs
		}
	}
	h.UserAgent = x.safe.text(x.cell(r, fUserAgent))
	h.TokenName = x.safe.text(x.cell(r, fToken))
	h.RequestID = x.requestID(x.cell(r, fRequestID))
	switch v := x.cell(r, fUser); strings.ToLower(v) {
	case "anonymous", "(anonymous)", "<anonymous>", "anon", "unauthenticated":
		h.Anonymous = true
	default:
		h.User = x.safe.text(v)
	}
	switch yes, no := truth(x.cell(r, fAnonymous)), truth(x.cell(r, fAuthenticated)); {
	case yes > 0, no < 0:
		h.Anonymous = true
	}
	h.Tag = x.safe.text(x.cell(r, fTag))
	h.Digest = x.safe.text(x.cell(r, fDigest))
	if v := x.cell(r, fImage); v != "" {
		h.Image = x.image(v)
	}
	if v := x.cell(r, fRepository); v != "" {
		if x.o.Format == DockerHubCSV {
			h.Image = x.image(v)
		} else {
			h.Repository = x.safe.text(strings.TrimSuffix(strings.Trim(v, "/"), ".git"))
		}
	}
	h.Class = class(h.Host, h.Path, t.push)
	if h.Repository == "" {
		h.Repository = repositoryOf(h.Host, h.Path, h.Class)
	}
	if h.Class == "" && (h.Path != "" || x.has(fURL) || x.has(fPath)) {
		h.Class = "other"
	}
	return ""
}

// counts reads the counts of rows that stand for more than one request.
func (x *table) counts(r *row, rec *record.Record) string {
	h := rec.HTTP
	for f, to := range map[field]**int64{fPulls: &h.Pulls, fChecks: &h.VersionChecks} {
		if !x.has(f) {
			continue
		}
		n, ok := int64(0), true
		if v := x.cell(r, f); v != "" {
			n, ok = count(v)
		}
		if !ok {
			return "the number of " + strings.ReplaceAll(names[f].name, "_", " ") + " is none"
		}
		*to = &n
	}
	if h.Pulls != nil || h.VersionChecks != nil {
		var pulls, checks int64
		if h.Pulls != nil {
			pulls = *h.Pulls
		}
		if h.VersionChecks != nil {
			checks = *h.VersionChecks
		}
		if pulls > math.MaxInt64-checks {
			return "the counts are too large"
		}
		h.Count = pulls + checks
		switch {
		case pulls > 0 && checks == 0:
			h.Class = "pull"
		case checks > 0 && pulls == 0:
			h.Class = "check"
		default:
			h.Class = ""
		}
	}
	if v := x.cell(r, fCount); v != "" && h.Pulls == nil && h.VersionChecks == nil {
		n, ok := count(v)
		if !ok {
			return "the count is none"
		}
		h.Count = n
	}
	if x.o.Format == DockerHubCSV {
		if h.Image == "" {
			return "the repository is missing"
		}
		h.Host = "docker.io"
		h.PeriodNS = int64(time.Hour)
		rec.TS = rec.TS.Truncate(time.Hour)
	}
	return ""
}

// image is a repository of Docker Hub or elsewhere with its registry.
func (x *table) image(v string) string {
	return cached(x.safe.images, v, func(v string) string { return x.safe.text(imageName(v)) })
}

// imageName is the name of an image with its registry and without tag and digest.
func imageName(v string) string {
	if ref, err := reference.ParseNormalizedNamed(strings.ToLower(v)); err == nil {
		return strings.Clone(ref.Name())
	}
	return v
}

// requestID keeps ids of the forms that are known; others could be anything.
func (x *table) requestID(v string) string {
	if len(v) > 128 || strings.Trim(strings.ToLower(v), "0123456789abcdef:-") != "" {
		return ""
	}
	return v
}

// count reads a number that is not negative, with or without separators of thousands.
func count(v string) (int64, bool) {
	v = strings.TrimSuffix(v, ".0")
	if strings.Contains(v, ",") {
		groups := strings.Split(v, ",")
		for i, g := range groups {
			if i > 0 && len(g) != 3 || i == 0 && (g == "" || len(g) > 3) {
				return 0, false
			}
		}
		v = strings.Join(groups, "")
	}
	n, err := strconv.ParseInt(v, 10, 64)
	return n, err == nil && n >= 0
}

// duration reads 12ms, 1.5s, or a number in the unit of its column, without one seconds.
func duration(v, scale string) (int64, bool) {
	if d, err := time.ParseDuration(v); err == nil {
		return int64(d), d >= 0
	}
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f >= 0) {
		return 0, false
	}
	unit := float64(time.Second)
	if scale == "ms" {
		unit = float64(time.Millisecond)
	}
	if f *= unit; f > math.MaxInt64/2 {
		return 0, false
	}
	return int64(f), true
}

// addresses reads IP addresses apart by commas, semicolons or spaces, with or without
// ports. A network, where the last part of addresses was masked, is taken as it is.
func addresses(v string) (list []string, ok bool) {
	if a, err := netip.ParseAddr(v); err == nil { // nearly all of them
		return []string{a.Unmap().WithZone("").String()}, true
	}
	for word := range strings.FieldsFuncSeq(v, func(c rune) bool { return strings.ContainsRune(",; []{}\"'", c) }) {
		var text string
		if a, err := netip.ParseAddr(word); err == nil {
			text = a.Unmap().WithZone("").String()
		} else if a, err := netip.ParseAddrPort(word); err == nil {
			text = a.Addr().Unmap().WithZone("").String()
		} else if p, err := netip.ParsePrefix(word); err == nil {
			text = p.String()
		} else if n, found := strings.CutPrefix(word, ":"); found && len(list) > 0 && len(n) <= 5 && strings.Trim(n, "0123456789") == "" {
			continue // the port of [address]:port, whose brackets are gone
		} else {
			return nil, false
		}
		if len(list) < 256 {
			list = append(list, text)
		}
	}
	return list, len(list) > 0
}

// truth reads yes as 1, no as -1 and anything else as 0.
func truth(v string) int {
	switch strings.ToLower(v) {
	case "true", "t", "yes", "y", "1":
		return 1
	case "false", "f", "no", "n", "0":
		return -1
	}
	return 0
}

// class says what kind of request a path is; "" where path and host say nothing.
func class(host, path string, push bool) string {
	has := func(part string) bool { return strings.Contains(path, part) }
	ends := func(part string) bool { return strings.HasSuffix(path, part) }
	api := host == "api.github.com" || strings.HasPrefix(path, "/api/v3/") || strings.HasPrefix(path, "/repos/") && host == ""
	switch {
	case path == "":
		return ""
	case ends("/info/refs") && push, ends("/git-receive-pack"):
		return "git-push"
	case ends("/info/refs"):
		return "git-refs"
	case ends("/git-upload-pack"):
		return "git-fetch"
	case has("/info/lfs/"):
		return "git-lfs"
	case path == "/v2" || path == "/v2/":
		return "registry-ping"
	case strings.HasPrefix(path, "/v2/") && has("/manifests/"):
		return "registry-manifest"
	case strings.HasPrefix(path, "/v2/") && has("/blobs/"):
		return "registry-blob"
	case strings.HasPrefix(path, "/v2/") && ends("/tags/list"):
		return "registry-tags"
	case path == "/token", ends("/oauth2/token"), path == "/login/oauth/access_token":
		return "token"
	case ends("/graphql"):
		return "graphql"
	case host == "codeload.github.com", has("/archive/"), has("/tarball/"), has("/zipball/"), ends("/tarball"), ends("/zipball"), has("/tar.gz/"), has("/legacy.tar.gz/"):
		return "archive"
	case has("/releases/download/"), host == "objects.githubusercontent.com", host == "release-assets.githubusercontent.com":
		return "release"
	case host == "raw.githubusercontent.com":
		return "raw"
	case api:
		return "api"
	case has("/raw/"):
		return "raw"
	case host == "github.com":
		return "web"
	}
	return "other"
}

// repositoryOf is the repository that a path of GitHub names.
func repositoryOf(host, path, class string) string {
	path = strings.TrimPrefix(path, "/api/v3")
	switch class {
	case "git-refs", "git-fetch", "git-push", "git-lfs":
		for _, tail := range []string{"/info/", "/git-upload-pack", "/git-receive-pack"} {
			if at := strings.Index(path, tail); at > 0 {
				path = path[:at]
				break
			}
		}
	case "archive", "release", "raw", "web", "api":
		if rest, ok := strings.CutPrefix(path, "/repos/"); ok {
			path = "/" + rest
		} else if class == "api" || host == "objects.githubusercontent.com" || host == "release-assets.githubusercontent.com" {
			return ""
		}
	default:
		return ""
	}
	parts := strings.SplitN(strings.Trim(path, "/"), "/", 3)
	if len(parts) < 2 || parts[0] == "" || parts[1] == "" || strings.Contains(path, redacted) {
		return ""
	}
	return parts[0] + "/" + strings.TrimSuffix(parts[1], ".git")
}
