package hook

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	// maxStepSummary is what the runner takes of one step; it refuses a larger file
	// whole (docs.github.com, "Adding a job summary").
	maxStepSummary = 1 << 20
	// maxSummary keeps ours short, and out of the way of others' in the same file.
	maxSummary = 64 << 10
)

// noDocker is the summary of a job that used no docker, where one is always wanted.
const noDocker = "### Docker\n\nNo docker calls were recorded in this job.\n"

// appendSummary appends text to the runner's summary file. The runner makes the file
// before it starts the hook; one that is not there would be read by nobody, so none is
// made. Another hook may have written to it before.
func appendSummary(path, text string) error {
	if path == "" {
		return nil // an old runner, or none: GITHUB_STEP_SUMMARY came with 2.289
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write the job summary: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("write the job summary: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return errors.New("write the job summary: not a regular file")
	}
	text = shorten(strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD"), maxSummary)
	if fi.Size() > 0 {
		text = "\n" + text
	}
	if fi.Size()+int64(len(text)) > maxStepSummary {
		return fmt.Errorf("write the job summary: the file holds %d bytes already, and the runner refuses more than %d", fi.Size(), maxStepSummary)
	}
	if _, err := f.WriteString(text); err != nil {
		return fmt.Errorf("write the job summary: %w", err)
	}
	return nil
}

// shorten cuts text at the last line that fits, and says so.
func shorten(text string, limit int) string {
	const note = "\n_The rest of this summary was cut._\n"
	if len(text) <= limit {
		return text
	}
	cut := text[:limit-len(note)]
	if i := strings.LastIndexByte(cut, '\n'); i >= 0 {
		cut = cut[:i+1]
	} else {
		for !utf8.ValidString(cut) {
			cut = cut[:len(cut)-1]
		}
	}
	return cut + note
}
