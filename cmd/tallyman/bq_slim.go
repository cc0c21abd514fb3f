//go:build slim || nobq

package main

import "github.com/urfave/cli/v2"

func (p *program) bqCommands() []*cli.Command { return nil }
