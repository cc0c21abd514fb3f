package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/tallyman-ci/tallyman/internal/statefile"
)

// manifestSchema is the newest form of the manifest that this version knows.
const manifestSchema = 1

// maxManifest bounds what is read of a manifest; a real one has 2 KB.
const maxManifest = 1 << 20

// Account is what an installation did. It is written before anything is done, so
// that also half an installation can be taken away: what it names may be there, and
// nothing else of ours is.
type Account struct {
	// Schema is 1. A higher one was written by a newer version, which alone can undo it.
	Schema int `json:"schema"`
	// User owns the folders for records.
	User string `json:"user"`
	// Places are the tools that were taken.
	Places []Place `json:"places"`
	// Files are files and links that were not there before.
	Files []File `json:"files"`
	// Dirs are folders that were not there before, in the order in which they were made.
	Dirs []string `json:"dirs"`
	// Data are those of Dirs that hold records.
	Data []string `json:"data"`
}

// Place is a path at which a shim stands for a tool.
type Place struct {
	Path string `json:"path"` // where the shim is
	Real string `json:"real"` // where the real tool is
	// Diverted: the diversion of dpkg from Path to Real is ours.
	Diverted bool `json:"diverted"`
}

// File is a file or link that install made.
type File struct {
	Path string `json:"path"`
	// SHA256 are, in hex, the contents that versions of ours gave it; what has another
	// one was edited.
	SHA256 []string `json:"sha256,omitempty"`
	// Link is the target where it is a symbolic link.
	Link string `json:"link,omitempty"`
}

// ErrNoManifest is returned where no installation was made by this command.
var ErrNoManifest = errors.New("nothing was installed here by tallyman install")

// ErrManifest is returned for an account that cannot be used.
var ErrManifest = errors.New("the account of the installation cannot be used")

var errNewer = errors.New("a newer version of Tallyman, use that one")

// Load reads the account of the installation below root, "" or "/" for this
// system. The error is ErrNoManifest or ErrManifest.
func Load(root string) (*Account, error) {
	t := newTree(root)
	data, err := statefile.Read(t.at(Manifest), maxManifest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrNoManifest
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	a, err := parseManifest(data)
	if err != nil {
		if errors.Is(err, errNewer) {
			return nil, fmt.Errorf("%s: %w", Manifest, err)
		}
		return nil, fmt.Errorf("%s: %w (mv %[1]s %[1]s.old and run it again: the tools' places are found without it)", Manifest, err)
	}
	return a, nil
}

// parseManifest reads an account. What it names is later removed by root, so it
// must be nothing but what install writes: clean absolute paths.
func parseManifest(data []byte) (*Account, error) {
	var a Account
	if err := json.Unmarshal(data, &a); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if a.Schema > manifestSchema {
		return nil, fmt.Errorf("%w: schema %d is of %w", ErrManifest, a.Schema, errNewer)
	}
	if a.Schema < 1 {
		return nil, fmt.Errorf("%w: it has no schema", ErrManifest)
	}
	for _, p := range a.Places {
		if !cleanPath(p.Path) || p.Real != p.Path+OriginalSuffix {
			return nil, fmt.Errorf("%w: the place %q with %q", ErrManifest, p.Path, p.Real)
		}
	}
	for _, f := range a.Files {
		if !cleanPath(f.Path) || (f.Link == "") == (len(f.SHA256) == 0) {
			return nil, fmt.Errorf("%w: the file %q", ErrManifest, f.Path)
		}
	}
	for _, d := range append(slices.Clone(a.Dirs), a.Data...) {
		if !cleanPath(d) {
			return nil, fmt.Errorf("%w: the folder %q", ErrManifest, d)
		}
	}
	return &a, nil
}

func cleanPath(p string) bool {
	return len(p) > 1 && strings.HasPrefix(p, "/") && path.Clean(p) == p && !strings.ContainsAny(p, "\x00\n")
}

func (a *Account) encode() ([]byte, error) {
	data, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the account of the installation: %w", err)
	}
	return append(data, '\n'), nil
}

func (a *Account) place(p string) *Place {
	for i := range a.Places {
		if a.Places[i].Path == p {
			return &a.Places[i]
		}
	}
	return nil
}

func (a *Account) file(p string) *File {
	for i := range a.Files {
		if a.Files[i].Path == p {
			return &a.Files[i]
		}
	}
	return nil
}

// addFile notes a file with a content, or a link.
func (a *Account) addFile(p, sum, link string) {
	f := a.file(p)
	if f == nil {
		a.Files = append(a.Files, File{Path: p})
		f = &a.Files[len(a.Files)-1]
	}
	f.Link = link
	if link == "" && !slices.Contains(f.SHA256, sum) {
		f.SHA256 = append(f.SHA256, sum)
	}
}

func (a *Account) addDir(p string, data bool) {
	if !slices.Contains(a.Dirs, p) {
		a.Dirs = append(a.Dirs, p)
	}
	if data && !slices.Contains(a.Data, p) {
		a.Data = append(a.Data, p)
	}
}

func (a *Account) clone() *Account {
	b := *a
	b.Places, b.Dirs, b.Data = slices.Clone(a.Places), slices.Clone(a.Dirs), slices.Clone(a.Data)
	b.Files = slices.Clone(a.Files)
	for i := range b.Files {
		b.Files[i].SHA256 = slices.Clone(b.Files[i].SHA256)
	}
	return &b
}
