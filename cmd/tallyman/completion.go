package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/tallyman-ci/tallyman/doctor"
)

// The scripts ask the program itself, by the hidden flag that
// cli.App.EnableBashCompletion understands.
const bashCompletion = `# bash completion of tallyman
_tallyman() {
	local cur=${COMP_WORDS[COMP_CWORD]} words opts
	words=("${COMP_WORDS[@]:1:COMP_CWORD-1}")
	[[ $cur == -* ]] && words+=("$cur")
	opts=$("${COMP_WORDS[0]}" "${words[@]}" --generate-bash-completion 2>/dev/null)
	mapfile -t COMPREPLY < <(compgen -W "$opts" -- "$cur")
}
complete -o bashdefault -o default -F _tallyman tallyman
`

const zshCompletion = `#compdef tallyman
_tallyman() {
	local -a opts ask
	ask=("${(@)words[1,CURRENT-1]}")
	[[ ${words[CURRENT]} == -* ]] && ask+=("${words[CURRENT]}")
	opts=("${(@f)$(SHELL=zsh "${(@)ask}" --generate-bash-completion 2>/dev/null)}")
	if [[ -n ${opts[1]} ]]; then
		_describe tallyman opts
	else
		_files
	fi
}
if [[ ${funcstack[1]} == _tallyman ]]; then
	_tallyman "$@"
else
	compdef _tallyman tallyman
fi
`

func (p *program) completionCommand() *cli.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cli.Command{
		Name: "completion", Category: forShell, Usage: "print the completion script of a shell",
		ArgsUsage: "bash|zsh|fish",
		Description: `Examples:
  source <(tallyman completion bash)                                       in ~/.bashrc
  tallyman completion zsh > "${fpath[1]}/_tallyman"
  tallyman completion fish > ~/.config/fish/completions/tallyman.fish`,
		BashComplete: func(*cli.Context) {
			for _, s := range shells {
				fmt.Fprintln(p.stdout, s)
			}
		},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return badUsage(c, "name one shell: bash, zsh or fish")
			}
			script := ""
			switch shell := c.Args().First(); shell {
			case "bash":
				script = bashCompletion
			case "zsh":
				script = zshCompletion
			case "fish":
				var err error
				if script, err = c.App.ToFishCompletion(); err != nil {
					return fmt.Errorf("make the completion script: %w", err)
				}
			default:
				return badUsage(c, "no completion for %q%s (there are bash, zsh and fish)", shell, didYouMean(doctor.Nearest(shell, shells)))
			}
			_, err := io.WriteString(p.stdout, script)
			return err
		},
	}
}
