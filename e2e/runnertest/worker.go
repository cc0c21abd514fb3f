package runnertest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// worker is the process that stands for Runner.Worker: the parent of the hooks and
// of all steps of one job, which lives as long as the job. Tallyman knows it by its
// name, finds the runner's folder by its executable and sees the runner's death by
// its end. It is a copy of bash that runs one script after the other.
type worker struct {
	cmd    *exec.Cmd
	dir    string // scripts and pipes
	tasks  io.WriteCloser
	status *bufio.Reader
	closer io.Closer // of status
	n      int
	done   chan struct{}
}

// drain is how long the runner waits for the end of a process's output after the end
// of the process (ProcessInvoker.cs).
const drain = 5 * time.Second

// isWorker reports whether this process stands for the Worker itself: a test that
// needs a Worker of its own making runs the jobs in it.
func isWorker() bool {
	comm, err := os.ReadFile("/proc/self/comm")
	return err == nil && strings.TrimSpace(string(comm)) == "Runner.Worker"
}

func startWorker(r *Runner) (*worker, error) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		return nil, fmt.Errorf("start the runner's Worker: %w", err)
	}
	path := filepath.Join(r.Root, "bin", "Runner.Worker")
	if err := copyProgram(bash, path); err != nil {
		return nil, fmt.Errorf("start the runner's Worker: %w", err)
	}
	w := &worker{dir: filepath.Join(r.Root, "_work", "_temp", "worker"), done: make(chan struct{})}
	if err := os.MkdirAll(w.dir, 0o755); err != nil {
		return nil, err
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer writer.Close()
	w.status, w.closer = bufio.NewReader(reader), reader

	w.cmd = exec.Command(path, "--noprofile", "--norc", "-c", `while IFS= read -r task; do . "$task"; done`)
	w.cmd.Env = r.Env
	w.cmd.Dir = r.Root
	w.cmd.ExtraFiles = []*os.File{writer} // descriptor 3
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: r.credential()}
	if w.tasks, err = w.cmd.StdinPipe(); err == nil {
		err = w.cmd.Start()
	}
	if err != nil {
		reader.Close()
		return nil, fmt.Errorf("start the runner's Worker: %w", err)
	}
	go func() {
		w.cmd.Wait()
		close(w.done)
	}()
	return w, nil
}

func copyProgram(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil // it may be running
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

// run runs a command as a child of the worker, with no environment but env.
func (w *worker) run(ctx context.Context, dir string, env []string, argv ...string) (Result, error) {
	w.n++
	base := filepath.Join(w.dir, strconv.Itoa(w.n))
	outs := make([]*output, 2)
	for i := range outs {
		out, err := newOutput(fmt.Sprintf("%s.%d", base, i+1))
		if err != nil {
			return Result{}, err
		}
		defer out.close()
		outs[i] = out
	}
	var task strings.Builder
	fmt.Fprintf(&task, "( cd %s || exit 125; exec /usr/bin/env -i", quote(dir))
	for _, word := range append(append([]string(nil), env...), argv...) {
		task.WriteString(" " + quote(word))
	}
	fmt.Fprintf(&task, " ) </dev/null >%s 2>%s 3>&-\nprintf '%%s\\n' \"$?\" >&3\n", quote(outs[0].path), quote(outs[1].path))
	if err := os.WriteFile(base, []byte(task.String()), 0o644); err != nil {
		return Result{}, err
	}
	defer os.Remove(base)

	stop := context.AfterFunc(ctx, w.kill)
	defer stop()
	began := time.Now()
	if _, err := fmt.Fprintln(w.tasks, base); err != nil {
		return Result{}, fmt.Errorf("run %s: the runner's Worker is gone: %w", argv[0], err)
	}
	line, err := w.status.ReadString('\n')
	took := time.Since(began)
	if err != nil {
		return Result{}, errors.Join(fmt.Errorf("run %s: the runner's Worker is gone: %w", argv[0], err), ctx.Err())
	}
	code, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return Result{}, fmt.Errorf("run %s: %w", argv[0], err)
	}
	result := Result{Code: code, Took: took}
	deadline := time.Now().Add(drain)
	stdout, held1 := outs[0].rest(deadline)
	stderr, held2 := outs[1].rest(deadline)
	result.Stdout, result.Stderr, result.Held = stdout, stderr, held1 || held2
	return result, nil
}

// kill ends the worker and what runs in it with SIGKILL.
func (w *worker) kill() {
	select {
	case <-w.done: // its number may be another's by now
	default:
		syscall.Kill(-w.cmd.Process.Pid, syscall.SIGKILL)
		<-w.done
	}
}

// end lets the worker end by itself, as after a job.
func (w *worker) end() {
	w.tasks.Close()
	select {
	case <-w.done:
	case <-time.After(drain):
		w.kill()
	}
	w.closer.Close()
}

// output is a FIFO for one stream of a process. Our own end for writing is open
// until the process has ended: without a writer, a reader would see the end before the
// process has opened its own.
type output struct {
	path   string
	reader *os.File
	writer *os.File
	text   strings.Builder
	ended  chan struct{}
}

func newOutput(path string) (*output, error) {
	if err := syscall.Mkfifo(path, 0o666); err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil { // whatever the umask is: the worker may be another user
		return nil, err
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	writer, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		reader.Close()
		return nil, err
	}
	o := &output{path: path, reader: reader, writer: writer, ended: make(chan struct{})}
	go func() {
		defer close(o.ended)
		io.Copy(&o.text, reader)
	}()
	return o, nil
}

// rest waits until nobody has the stream open, at most until the deadline, and
// returns what came.
func (o *output) rest(deadline time.Time) (text string, held bool) {
	o.writer.Close()
	o.reader.SetReadDeadline(deadline)
	<-o.ended
	held = !time.Now().Before(deadline)
	return o.text.String(), held
}

func (o *output) close() {
	o.writer.Close()
	o.reader.SetReadDeadline(time.Now())
	<-o.ended
	o.reader.Close()
	os.Remove(o.path)
}

// quote makes one word of a shell's text.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// writeLog writes the job's message into the Worker's log, as the runner does before
// it starts the hook (Worker.cs). The numbers and names in it are in no variable.
func (j *Job) writeLog(now time.Time) error {
	type pair struct {
		K string `json:"k"`
		V any    `json:"v"`
	}
	dictionary := func(pairs ...pair) any {
		return map[string]any{"t": 2, "d": pairs}
	}
	display := j.DisplayName
	if display == "" {
		display = j.Spec.Job
	}
	message, err := json.MarshalIndent(map[string]any{
		"messageType":    "RunnerJobRequest",
		"jobDisplayName": display,
		"variables":      map[string]any{"system.github.job": map[string]string{"value": j.Spec.Job}},
		"contextData": map[string]any{
			"github": dictionary(pair{"repository", j.Repository}, pair{"run_id", strconv.FormatInt(j.RunID, 10)}, pair{"run_attempt", "1"}),
			"job":    dictionary(pair{"check_run_id", float64(j.JobID)}),
		},
	}, " ", "  ")
	if err != nil {
		return err
	}
	utc := now.UTC()
	head := utc.Format("[2006-01-02 15:04:05Z INFO Worker] ")
	path := filepath.Join(j.runner.Root, "_diag", utc.Format("Worker_20060102-150405-utc.log"))
	return os.WriteFile(path, []byte(head+"Version: 2.336.0\n"+head+"Job message:\n "+string(message)+"\n"), 0o644)
}
