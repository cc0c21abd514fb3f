package commandline

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/internal/nearest"
)

// The scripts ask the program itself, by the hidden flag that
// cli.App.EnableBashCompletion understands.
const bashCompletion = `# bash completion of PROGRAM
FUNCTION() {
	local cur=${COMP_WORDS[COMP_CWORD]} words opts
	words=("${COMP_WORDS[@]:1:COMP_CWORD-1}")
	[[ $cur == -* ]] && words+=("$cur")
	opts=$("${COMP_WORDS[0]}" "${words[@]}" --generate-bash-completion 2>/dev/null)
	mapfile -t COMPREPLY < <(compgen -W "$opts" -- "$cur")
}
complete -o bashdefault -o default -F FUNCTION PROGRAM
`

const zshCompletion = `#compdef PROGRAM
FUNCTION() {
	local -a opts ask
	ask=("${(@)words[1,CURRENT-1]}")
	[[ ${words[CURRENT]} == -* ]] && ask+=("${words[CURRENT]}")
	opts=("${(@f)$(SHELL=zsh "${(@)ask}" --generate-bash-completion 2>/dev/null)}")
	if [[ -n ${opts[1]} ]]; then
		_describe PROGRAM opts
	else
		_files
	fi
}
if [[ ${funcstack[1]} == FUNCTION ]]; then
	FUNCTION "$@"
else
	compdef FUNCTION PROGRAM
fi
`

// script fills in a completion script.
func script(text, program string) string {
	return strings.NewReplacer("FUNCTION", "_"+program, "PROGRAM", program).Replace(text)
}

func completionCommand(program string) *cli.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cli.Command{
		Name: "completion", Category: ForShell, Usage: "print the completion script of a shell",
		ArgsUsage: "bash|zsh|fish",
		Description: strings.ReplaceAll(`Examples:
  source <(PROGRAM completion bash)      in ~/.bashrc
  PROGRAM completion zsh > "${fpath[1]}/_PROGRAM"
  PROGRAM completion fish > ~/.config/fish/completions/PROGRAM.fish`, "PROGRAM", program),
		BashComplete: func(c *cli.Context) {
			for _, s := range shells {
				fmt.Fprintln(c.App.Writer, s)
			}
		},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return BadUsage(c, "name one shell: bash, zsh or fish")
			}
			text := ""
			switch shell := c.Args().First(); shell {
			case "bash":
				text = script(bashCompletion, program)
			case "zsh":
				text = script(zshCompletion, program)
			case "fish":
				var err error
				if text, err = c.App.ToFishCompletion(); err != nil {
					return fmt.Errorf("make the completion script: %w", err)
				}
			default:
				return BadUsage(c, "no completion for %q%s (there are bash, zsh and fish)", shell, DidYouMean(nearest.Word(shell, shells)))
			}
			_, err := io.WriteString(c.App.Writer, text)
			return err
		},
	}
}
