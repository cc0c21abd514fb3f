package report

import (
	"strings"

	"github.com/distribution/reference"
)

// image is an image reference as the report counts it.
type image struct {
	name     string // normalised: alpine, docker.io/library/alpine:latest and index.docker.io/alpine are one
	registry string // docker.io, ghcr.io, localhost:5000; empty where there is none (an id, or no reference at all)
}

// What stands in a table for something that is no image reference.
const (
	imageByID   = "(by id)"
	imageNotRef = "(not an image reference)"
	imageNone   = "(not named)" // docker compose pull: the images stand in a file
)

// images normalises references and remembers what it normalised: the grammar is a
// large regular expression and costs microseconds, and journals repeat themselves.
type images struct {
	known map[string]image
}

const maxKnownImages = 4096 // the map is emptied when it is full; it is only a cache

func newImages() *images { return &images{known: make(map[string]image)} }

func (m *images) normalise(raw []byte) image {
	if im, ok := m.known[string(raw)]; ok {
		return im
	}
	if len(m.known) >= maxKnownImages {
		clear(m.known)
	}
	im := normaliseImage(string(raw))
	if len(raw) <= maxKeyBytes {
		m.known[string(raw)] = im
	}
	return im
}

func normaliseImage(raw string) image {
	if isImageID(raw) {
		return image{name: imageByID}
	}
	if len(raw) > maxKeyBytes {
		return image{name: imageNotRef}
	}
	named, err := reference.ParseDockerRef(raw)
	if err != nil {
		return image{name: imageNotRef}
	}
	return image{name: named.String(), registry: reference.Domain(named)}
}

// isImageID recognises sha256:<hex> and a bare id of 64 hexadecimal digits. A
// short id cannot be told from a name (`cafe` is both) and is counted as a name,
// as docker itself tries the name first.
func isImageID(s string) bool {
	s = strings.TrimPrefix(s, "sha256:")
	if len(s) != 64 {
		return false
	}
	return strings.Trim(s, "0123456789abcdef") == ""
}

// familiar is the form people type: docker.io/library/alpine:3.20 is alpine:3.20.
func familiar(name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(named)
}

func familiarList(raw []string) string {
	names := make([]string, len(raw))
	for i, r := range raw {
		names[i] = familiar(r)
	}
	return strings.Join(names, " ")
}
