package main

import (
	"bufio"
	"encoding/json"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// parsed is what the command tree makes of one command line.
type parsed struct {
	Argv    []string          `json:"argv"` // without the tool's own name
	Command string            `json:"command"`
	Args    []string          `json:"args"`            // the operands
	Flags   map[string]string `json:"flags,omitempty"` // values of the command's own flags, as they print themselves
	Error   string            `json:"error,omitempty"`
}

// parse reads command lines, one JSON array each, and writes what the command tree makes
// of them: the expectations of the shim's own parser (wrapper/testdata/argv-tree.jsonl).
func parse(in io.Reader, out io.Writer, tree func() (*cobra.Command, error)) error {
	lines := bufio.NewScanner(in)
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	for lines.Scan() {
		var p parsed
		if err := json.Unmarshal(lines.Bytes(), &p.Argv); err != nil {
			return err
		}
		root, err := tree() // anew for each line: flags keep their values
		if err != nil {
			return err
		}
		root.Flags().SetInterspersed(false)
		command, rest, err := root.Traverse(p.Argv)
		if err == nil {
			p.Command = strings.TrimPrefix(command.CommandPath(), "docker ")
			err = command.ParseFlags(rest)
			p.Args = command.Flags().Args()
			command.Flags().Visit(func(f *pflag.Flag) {
				if p.Flags == nil {
					p.Flags = map[string]string{}
				}
				p.Flags[f.Name] = f.Value.String()
			})
		}
		if err != nil {
			p.Error = err.Error()
		}
		if err := encoder.Encode(p); err != nil {
			return err
		}
	}
	return lines.Err()
}
