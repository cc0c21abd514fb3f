package wrapper

import "strings"

// validReference tells whether s has the form of an image reference, by the grammar
// of github.com/distribution/reference: [domain/]path[:tag][@digest], where path is
// lower case. Anything else on the command line is not taken for an image.
func validReference(s string) bool {
	if s == "" || len(s) > 512 {
		return false
	}
	name, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest && !validDigest(digest) {
		return false
	}
	// A colon after the last slash starts the tag; before it, a port.
	slash := strings.LastIndexByte(name, '/')
	if colon := strings.LastIndexByte(name, ':'); colon > slash {
		if !validTag(name[colon+1:]) {
			return false
		}
		name = name[:colon]
	}
	if len(name) > 255 {
		return false
	}
	path := name
	// The first component is a domain where it looks like one: with a dot, a colon
	// or an upper-case letter, or localhost.
	if first, rest, ok := strings.Cut(name, "/"); ok &&
		(strings.ContainsAny(first, ".:") || first == "localhost" || strings.ToLower(first) != first) {
		if !validDomain(first) {
			return false
		}
		path = rest
	}
	for {
		component, rest, more := strings.Cut(path, "/")
		if !validComponent(component) {
			return false
		}
		if !more {
			return true
		}
		path = rest
	}
}

// validComponent: runs of [a-z0-9], apart by one dot, one or two underscores, or any
// number of dashes.
func validComponent(s string) bool {
	alnum := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	if s == "" || !alnum(s[0]) || !alnum(s[len(s)-1]) {
		return false
	}
	for i := 0; i < len(s); {
		if alnum(s[i]) {
			i++
			continue
		}
		j := i
		for !alnum(s[j]) {
			j++
		}
		switch sep := s[i:j]; {
		case sep == "." || sep == "_" || sep == "__" || strings.Trim(sep, "-") == "":
		default:
			return false
		}
		i = j
	}
	return true
}

func validTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; !letterOrDigit(c) && c != '_' && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

func letterOrDigit(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// validDigest: one of the registered algorithms with all of its hex digits.
func validDigest(s string) bool {
	algorithm, hex, _ := strings.Cut(s, ":")
	digits := 0
	switch algorithm {
	case "sha256":
		digits = 64
	case "sha384":
		digits = 96
	case "sha512":
		digits = 128
	}
	return digits > 0 && len(hex) == digits && strings.Trim(hex, "0123456789abcdef") == ""
}

// validDomain: host[:port], the host a name of letters, digits, dots and dashes, or
// an IPv6 address in brackets.
func validDomain(s string) bool {
	host, port := s, ""
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 || end == 1 {
			return false
		}
		for i := 1; i < end; i++ {
			if c := s[i]; c != ':' && (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') {
				return false
			}
		}
		port = s[end+1:]
	} else {
		if colon := strings.IndexByte(s, ':'); colon >= 0 {
			host, port = s[:colon], s[colon:]
		}
		for {
			label, rest, more := strings.Cut(host, ".")
			if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
				return false
			}
			for i := 0; i < len(label); i++ {
				if !letterOrDigit(label[i]) && label[i] != '-' {
					return false
				}
			}
			if !more {
				break
			}
			host = rest
		}
	}
	if port == "" {
		return true
	}
	if port[0] != ':' || len(port) < 2 {
		return false
	}
	return strings.Trim(port[1:], "0123456789") == ""
}
