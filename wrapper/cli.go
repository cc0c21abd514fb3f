package wrapper

import "strings"

// call is what may be kept of a command line. Default deny: everything that is not
// named here stays out of the record.
type call struct {
	command  string   // path of subcommands, as typed
	images   []string // image references, in order, as typed
	flags    []string // names of known flags, in order, as typed
	platform string
	target   string
	daemon   string // class of daemon that a flag chose, or ""
	clipped  bool   // lists were cut at maxList
}

// Bounds of what is looked at of one command line. They bound the time; a clock would
// not do, because on a busy virtual machine even the thread's own clock counts time
// that it did not have.
const (
	maxList     = 256       // images, and flags, that are kept
	maxFlags    = 4096      // flags that are read
	maxExamined = 256 << 10 // bytes that are read
)

// unknownFlag stands for a flag that the table does not know. Its name is not kept,
// because a secret typed after a dash looks the same.
const unknownFlag = "--?"

//go:generate go run ../internal/gen/flagsgen

// parse describes the arguments of the docker CLI, the tool's own name left out, as
// its cobra command tree would read them. keep tells whether a value is free of
// secrets. Unknown flags, whose arity nobody knows, end the search for images among
// the operands; they never are an error.
func parse(args []string, keep func(string) bool) call {
	p := parser{keep: keep}
	for p.args = args; len(p.args) > 0 && !p.done; {
		arg := p.next()
		switch {
		case p.flagsEnded || len(arg) < 2 || arg[0] != '-':
			p.word(arg)
		case arg == "--":
			p.flagsEnded = true
		case arg[1] == '-':
			p.longFlag(arg)
		default:
			p.shortFlags(arg)
		}
	}
	return p.call
}

type parser struct {
	call
	args       []string
	keep       func(string) bool
	leaf       bool // the command path is complete
	flagsEnded bool // what follows are operands
	uncertain  bool // an unknown flag may have taken the next operand as its value
	operands   int
	lines      []string // flags of the command, its parents and its other name
	read       int      // flags read so far
	examined   int      // bytes of the arguments read so far
	done       bool
}

func (p *parser) next() string {
	arg := p.args[0]
	p.args = p.args[1:]
	if p.examined += len(arg) + 1; p.examined > maxExamined {
		p.clipped, p.args, arg = true, nil, ""
	}
	return arg
}

// word takes the next word of the command path, or an operand.
func (p *parser) word(arg string) {
	if !p.leaf {
		path := arg
		if p.command != "" {
			path = p.command + " " + arg
		}
		if _, ok := flagsOf(path); ok {
			p.command, p.lines = path, nil
			return
		}
		if p.command == "" {
			// A plugin or a command newer than the table: its name is kept, and
			// nothing else, since none of its flags is known.
			if commandName(arg) && p.keep(arg) {
				p.command = arg
			}
			p.done = true
			return
		}
		p.leaf = true
	}
	p.operand(arg)
	p.operands++
}

// commandName tells whether s looks like the name of a subcommand or plugin.
func commandName(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < 'a' || c > 'z') && (i == 0 || c != '-' && (c < '0' || c > '9')) {
			return false
		}
	}
	return s != "" && len(s) <= 32
}

// operand takes an operand of a known command. The docker CLI stops reading flags
// at the first operand of some commands (SetInterspersed(false)).
func (p *parser) operand(arg string) {
	image := false
	switch strings.TrimPrefix(strings.TrimPrefix(p.command, "container "), "image ") {
	case "run", "create", "service create":
		image, p.done = true, true // all that follows belongs to the container
	case "exec", "top":
		p.done = true
	case "commit":
		image, p.flagsEnded = p.operands == 1, true
	case "tag":
		image, p.flagsEnded = p.operands < 2, true
	case "import":
		image = p.operands == 1
	case "pull", "push":
		image = p.operands == 0 && !strings.HasPrefix(p.command, "container")
	case "rmi", "rm", "remove", "save", "history", "inspect":
		image = p.command == "rmi" || p.command == "save" || p.command == "history" || strings.HasPrefix(p.command, "image ")
	case "buildx imagetools create", "buildx imagetools inspect", "manifest create", "manifest annotate", "manifest push", "manifest inspect":
		image = true
	}
	if image && !p.uncertain {
		p.image(arg)
	}
}

func (p *parser) longFlag(arg string) {
	name, value, hasValue := strings.Cut(arg[2:], "=")
	takes, known := p.lookup("|" + name)
	if !known || strings.ContainsAny(name, "|/=>") {
		p.flag(unknownFlag)
		p.uncertain = p.uncertain || !hasValue
		return
	}
	p.flag("--" + name)
	if takes && !hasValue && len(p.args) > 0 {
		value = p.next()
	}
	if takes {
		p.value(name, value)
	}
}

// shortFlags takes a cluster such as -it or -p8080:80: the first letter with a value
// takes the rest of the word, or else the next word.
func (p *parser) shortFlags(arg string) {
	for i := 1; i < len(arg); i++ {
		letter := arg[i]
		takes, known := false, false
		if letter >= 'A' && letter <= 'Z' || letter >= 'a' && letter <= 'z' {
			takes, known = p.lookup("/" + arg[i:i+1])
		}
		if !known {
			p.flag(unknownFlag)
			p.uncertain = true
			return
		}
		p.flag("-" + arg[i:i+1])
		if !takes {
			if i+1 < len(arg) && arg[i+1] == '=' { // -q=true
				return
			}
			continue
		}
		value := strings.TrimPrefix(arg[i+1:], "=")
		if i+1 == len(arg) && len(p.args) > 0 {
			value = p.next()
		}
		p.value(shortNames(p.command, letter), value)
		return
	}
}

// shortNames gives the long name of the short flags whose values are looked at.
func shortNames(command string, letter byte) string {
	switch letter {
	case 't':
		return "tag"
	case 'o':
		return "output"
	case 'H', 'c':
		if command != "" {
			return ""
		}
		if letter == 'H' {
			return "host"
		}
		return "context"
	}
	return ""
}

// lookup finds a flag, given as "|long" or "/s", among those of the command and,
// as cobra's persistent flags, of its parents; `docker build` forwards to buildx and
// so takes the flags of both.
func (p *parser) lookup(flag string) (takesValue, known bool) {
	if p.lines == nil {
		p.lines = flagLines(p.command)
	}
	if p.read++; p.read > maxFlags {
		p.clipped, p.args = true, nil
		return false, false
	}
	for _, line := range p.lines {
		if takes, ok := findFlag(line, flag); ok {
			return takes, true
		}
	}
	return false, false
}

// flagLines are the lines of the table in which a command's flags stand.
func flagLines(command string) (lines []string) {
	for {
		line, _ := flagsOf(command)
		lines = append(lines, line)
		if command == "build" || command == "image build" || command == "builder build" {
			command = "buildx build"
			continue
		}
		i := strings.LastIndexByte(command, ' ')
		if i < 0 {
			return lines
		}
		command = command[:i]
	}
}

// findFlag searches one line of the table.
func findFlag(line, flag string) (takesValue, known bool) {
	for {
		i := strings.Index(line, flag)
		if i < 0 {
			return false, false
		}
		line = line[i+len(flag):]
		end := strings.IndexByte(line+"|", '|')
		entry := line[:end]
		// After a long name its short form may follow; after a short one nothing does.
		if entry == "" || entry[0] == '=' || flag[0] == '|' && entry[0] == '/' {
			return strings.HasSuffix(entry, "="), true
		}
	}
}

// flagsOf returns the flags of a command path, and whether there is such a command.
func flagsOf(command string) (line string, ok bool) {
	if strings.ContainsAny(command, "|>\n") {
		return "", false
	}
	i := strings.Index(commandTable, "\n"+command+"|")
	if i < 0 {
		i = strings.Index(commandTable, "\n"+command+">")
	}
	if i < 0 {
		return "", false
	}
	line = commandTable[i+1+len(command):]
	line = line[:strings.IndexByte(line, '\n')]
	if line[0] == '>' {
		return flagsOf(line[1:])
	}
	return line, true
}

func (p *parser) flag(name string) {
	if len(p.flags) == maxList {
		p.clipped = true
		return
	}
	p.flags = append(p.flags, name)
}

// value looks at the value of a flag for what may be kept of it.
func (p *parser) value(name, value string) {
	switch name {
	case "platform":
		if plain(value) && p.keep(value) {
			p.platform = value
		}
	case "target":
		if plain(value) && p.keep(value) && strings.HasSuffix(p.command, "build") {
			p.target = value
		}
	case "tag":
		if strings.HasSuffix(p.command, "build") || p.command == "buildx imagetools create" {
			p.image(value)
		}
	case "image":
		if p.command == "service update" {
			p.image(value)
		}
	case "cache-from", "cache-to":
		if !strings.Contains(value, "=") {
			p.image(value)
		} else if csvValue(value, "type") == "registry" {
			p.image(csvValue(value, "ref"))
		}
	case "output":
		if t := csvValue(value, "type"); t == "image" || t == "registry" {
			p.image(csvValue(value, "name"))
		}
	case "build-context":
		if _, ref, ok := strings.Cut(value, "=docker-image://"); ok {
			p.image(ref)
		}
	case "host":
		if p.command == "" {
			p.daemon = daemonClass(value)
		}
	case "context":
		if p.command == "" {
			p.daemon = "context"
		}
	}
}

// plain tells whether s is made of the characters of platforms and stage names
// alone, so that no escaped form of a secret can hide in it.
func plain(s string) bool {
	for i := 0; i < len(s); i++ {
		if !letterOrDigit(s[i]) && strings.IndexByte("_.-/,:", s[i]) < 0 {
			return false
		}
	}
	return true
}

// csvValue returns the value of key in a list such as type=image,name=x,push=true.
func csvValue(list, key string) string {
	for list != "" {
		var item string
		item, list, _ = strings.Cut(list, ",")
		if k, v, ok := strings.Cut(item, "="); ok && k == key {
			return v
		}
	}
	return ""
}

func (p *parser) image(ref string) {
	if len(p.images) == maxList {
		p.clipped = true
		return
	}
	if !validReference(ref) || !p.keep(ref) {
		return
	}
	p.images = append(p.images, ref)
}

// daemonClass returns the kind of address, never the address.
func daemonClass(host string) string {
	scheme, _, ok := strings.Cut(host, "://")
	switch {
	case !ok && host == "":
		return ""
	case !ok:
		return "tcp" // the CLI takes a bare host as TCP
	case scheme == "unix" || scheme == "tcp" || scheme == "ssh" || scheme == "npipe" || scheme == "fd":
		return scheme
	case scheme == "http" || scheme == "https":
		return "tcp"
	}
	return "other"
}
