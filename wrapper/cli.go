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
	daemon   string   // class of daemon that a flag chose, or ""
	argv     []string // the whole line, redacted; only where it is asked for
	clipped  bool     // lists were cut
}

// Bounds of what is looked at of one command line. They bound the time; a clock would
// not do, because on a busy virtual machine even the thread's own clock counts time
// that it did not have.
const (
	maxList     = 256       // images, flags, and arguments, that are kept
	maxFlags    = 4096      // flags that are read
	maxExamined = 256 << 10 // bytes that are read
)

// unknownFlag stands for a flag that the table does not know. Its name is not kept,
// because a secret typed after a dash looks the same.
const unknownFlag = "--?"

//go:generate sh -c "cd ../internal/gen/clitree && go run -mod=readonly . >../../../wrapper/flags.tsv.new && mv ../../../wrapper/flags.tsv.new ../../../wrapper/flags.tsv"
//go:generate go run ../internal/gen/flagsgen

// describeCommand describes the arguments of a tool, its own name left out. Of a tool
// that does not read its command line as docker does, nothing is known but that its
// first word may be a command.
func describeCommand(tool string, args []string, s *scrubber, whole bool) call {
	switch tool {
	case "docker", "podman", "nerdctl":
		return parse(args, s, whole)
	}
	p := parser{scrub: s, whole: whole, args: args}
	if len(args) > 0 && commandName(args[0]) && s.keepText(args[0]) {
		p.command = p.next()
		p.emit(p.command)
	}
	if len(p.args) > 0 {
		p.emitCount(len(p.args))
	}
	return p.call
}

// parse describes the arguments of the docker CLI, the tool's own name left out, as
// its cobra command tree would read them. Unknown flags, whose arity nobody knows, end
// the search for images among the operands; they never are an error. With whole set it
// also redacts the line as a whole.
func parse(args []string, s *scrubber, whole bool) call {
	p := parser{scrub: s, whole: whole}
	for p.args = args; len(p.args) > 0 && !p.done; {
		arg := p.next()
		switch {
		case p.flagsEnded || len(arg) < 2 || arg[0] != '-':
			p.word(arg)
		case arg == "--":
			p.emit(arg)
			p.flagsEnded, p.pending = true, false
		case arg[1] == '-':
			p.longFlag(arg)
		default:
			p.shortFlags(arg)
		}
	}
	if len(p.args) > 0 {
		p.emitCount(len(p.args))
	}
	return p.call
}

type parser struct {
	call
	args       []string
	scrub      *scrubber
	whole      bool // argv is wanted
	leaf       bool // the command path is complete
	strange    bool // the command is in no table
	novel      bool // the subcommand is in no table, and its operands are unknown
	flagsEnded bool // what follows are operands
	pending    bool // the flag before is unknown, and may take the next word
	uncertain  bool // an unknown flag may have taken an operand as its value
	operands   int
	lines      []string // flags of the command and of its other name
	read       int      // flags read so far
	examined   int      // bytes of the arguments read so far
	emitted    int      // bytes in argv
	done       bool     // what is left is only counted
}

func (p *parser) next() string {
	arg := p.args[0]
	p.args = p.args[1:]
	if p.examined += len(arg) + 1; p.examined > maxExamined {
		p.clipped, p.args, p.whole, arg = true, nil, false, ""
	}
	return arg
}

// word takes the next word of the command path, or an operand.
func (p *parser) word(arg string) {
	pending := p.pending
	p.pending = false
	if !p.leaf {
		path := arg
		if p.command != "" {
			path = p.command + " " + arg
		}
		if _, ok := flagsOf(path); ok {
			p.command, p.lines = path, nil
			p.emit(arg)
			return
		}
	}
	if pending {
		p.emit(redacted) // the unknown flag's value, or an operand: nobody knows
		return
	}
	if !p.leaf && p.command == "" {
		// A plugin or a command newer than the table. Its name is kept; none of its
		// flags is known, so no image can be told from the rest.
		p.leaf, p.strange, p.uncertain = true, true, true
		if !commandName(arg) || !p.scrub.keepText(arg) {
			p.emit(redacted)
			p.done = true
			return
		}
		p.command = arg
		p.emit(arg)
		p.done = !p.whole
		return
	}
	if !p.leaf && p.command != "" && strings.Contains(commandTable, "\n"+p.command+" ") && !hasOperands(p.command) {
		p.novel = true // a subcommand that the table does not know; what follows may be anything
	}
	p.leaf = true
	p.operand(arg)
	p.operands++
}

// hasOperands tells whether a command that has subcommands takes operands itself.
func hasOperands(command string) bool { return command == "buildx history inspect" }

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
// at the first operand of some commands (SetInterspersed(false)), which the table
// marks. What then follows the image or the container belongs to the process in it.
func (p *parser) operand(arg string) {
	n, image, rest := p.operands, false, false
	switch strings.TrimPrefix(strings.TrimPrefix(p.command, "container "), "image ") {
	case "run", "create", "service create":
		image, rest = true, true
	case "exec", "top", "compose run", "compose exec":
		rest = true
	case "commit", "import", "compose commit":
		image = n == 1
	case "tag":
		image = n < 2
	case "pull", "push", "images", "compose publish", "compose alpha publish":
		image = n == 0 && !strings.HasPrefix(p.command, "container")
	case "ls", "list":
		image = n == 0 && strings.HasPrefix(p.command, "image ")
	case "inspect":
		// What docker inspect names without saying its type can be anything; a
		// container's name has none of these characters.
		image = p.command == "image inspect" || p.command == "inspect" && strings.ContainsAny(arg, ":/@")
	case "rmi", "rm", "remove", "save", "history":
		image = p.command == "rmi" || p.command == "save" || p.command == "history" || strings.HasPrefix(p.command, "image ")
	case "buildx imagetools create", "buildx imagetools inspect",
		"manifest create", "manifest annotate", "manifest push", "manifest inspect", "manifest rm",
		"trust sign", "trust inspect", "trust revoke":
		image = true
	}
	if p.uncertain && rest {
		// The image may have been the word that was taken for a flag's value, and this
		// one an argument of the container.
		p.emitCount(len(p.args) + 1)
		p.done, p.args = true, nil
		return
	}
	switch {
	case p.strange, p.novel:
		p.emitStrange(arg)
	case image && p.uncertain:
		p.emit(redacted)
	case image:
		p.emitImage(arg, p.image(arg))
	case n > 0 && p.command == "secret create", p.command == "swarm unlock":
		p.emit(redacted) // a file's name, or what somebody took to be the place of the secret
	default:
		p.emitOperand(arg)
	}
	p.done = p.done || rest
	if n == 0 && !p.flagsEnded {
		_, p.flagsEnded = p.lookup("|!")
	}
}

func (p *parser) longFlag(arg string) {
	name, value, hasValue := strings.Cut(arg[2:], "=")
	long, takes, known := "", false, false
	if !strings.ContainsAny(name, "|/=>!") {
		long, takes, known = p.find("|" + name)
	}
	if !known {
		p.unknown(arg, name, hasValue)
		return
	}
	p.pending = false
	p.flag("--" + name)
	switch {
	case !takes && hasValue:
		p.emitPair("--"+name, boolean(value))
	case !takes:
		p.emit("--" + name)
	case hasValue:
		p.emitPair("--"+name, p.value(long, value))
	default:
		p.emit("--" + name)
		p.nextValue(long)
	}
}

// nextValue takes the next word as the value of a flag.
func (p *parser) nextValue(long string) {
	if len(p.args) > 0 {
		p.emit(p.value(long, p.next()))
	}
}

// unknown takes a flag of which nothing is known but its name. Where its value, if it
// takes one, is not in the same word, it may be the next.
func (p *parser) unknown(arg, name string, hasValue bool) {
	p.flag(unknownFlag)
	// After an unknown flag, what looks like a flag may be the value of that.
	shown := unknownFlag
	if !p.pending && flagName(name) && p.scrub.keepText(name) {
		shown = "--" + name
	}
	p.pending, p.uncertain = !hasValue, p.uncertain || !hasValue
	if hasValue {
		p.emitPair(shown, redacted)
	} else {
		p.emit(shown)
	}
}

// flagName tells whether s looks like the long name of a flag.
func flagName(s string) bool {
	return len(s) > 1 && len(s) <= 40 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz-") == "" && s[0] != '-'
}

// shortFlags takes a cluster such as -it or -p8080:80: the first letter with a value
// takes the rest of the word, or else the next word.
func (p *parser) shortFlags(arg string) {
	pending := p.pending
	p.pending = false
	for i := 1; i < len(arg); i++ {
		letter := arg[i]
		long, takes, known := "", false, false
		if letter >= 'A' && letter <= 'Z' || letter >= 'a' && letter <= 'z' {
			long, takes, known = p.find("/" + arg[i:i+1])
		}
		if !known {
			p.flag(unknownFlag)
			p.uncertain = true
			shown := unknownFlag
			if letterOrDigit(letter) && i == 1 && !pending {
				shown = arg[:2]
			}
			p.emit(shown)
			if i+1 < len(arg) {
				p.emit(redacted)
			} else {
				p.pending = true
			}
			return
		}
		p.flag("-" + arg[i:i+1])
		if !takes {
			if i+1 < len(arg) && arg[i+1] == '=' { // -q=true
				p.emitPair("-"+arg[i:i+1], boolean(arg[i+2:]))
				return
			}
			p.emit("-" + arg[i:i+1])
			continue
		}
		p.emit("-" + arg[i:i+1])
		if i+1 < len(arg) {
			p.emit(p.value(long, strings.TrimPrefix(arg[i+1:], "=")))
		} else {
			p.nextValue(long)
		}
		return
	}
}

// find is lookup for a flag that was typed, given as "|long" or "/s"; it gives the
// flag's long name too.
func (p *parser) find(flag string) (long string, takesValue, known bool) {
	if p.read++; p.read > maxFlags {
		p.clipped, p.args, p.whole = true, nil, false
		return "", false, false
	}
	if p.strange {
		return "", false, false
	}
	entry, ok := p.lookup(flag)
	if !ok {
		return "", false, false
	}
	long = strings.TrimPrefix(strings.TrimSuffix(entry, "="), "|")
	if i := strings.IndexByte(long, '/'); i >= 0 {
		long = long[:i]
	}
	return long, strings.HasSuffix(entry, "="), true
}

// lookup finds the entry of a flag in the command's lines of the table.
func (p *parser) lookup(flag string) (entry string, ok bool) {
	if p.strange {
		return "", false
	}
	if p.lines == nil {
		p.lines = flagLines(p.command)
	}
	for _, line := range p.lines {
		if entry, ok := findFlag(line, flag); ok {
			return entry, true
		}
	}
	return "", false
}

// flagLines are the lines of the table in which a command's flags stand: its own and,
// since the CLI forwards builds to buildx, those of its namesake there.
func flagLines(command string) []string {
	own, _ := flagsOf(command)
	lines := []string{own}
	twin := ""
	switch {
	case command == "build" || command == "bake":
		twin = "buildx " + command
	case command == "image build":
		twin = "buildx build"
	case strings.HasPrefix(command, "builder "):
		twin = "buildx " + command[len("builder "):]
	}
	if line, ok := flagsOf(twin); ok && twin != "" {
		lines = append(lines, line)
	}
	return append(lines, "|help")
}

// findFlag searches one line of the table.
func findFlag(line, flag string) (entry string, ok bool) {
	for from := 0; ; {
		i := strings.Index(line[from:], flag)
		if i < 0 {
			return "", false
		}
		i += from
		from = i + len(flag)
		end := len(line)
		if bar := strings.IndexByte(line[from:], '|'); bar >= 0 {
			end = from + bar
		}
		rest := line[from:end]
		// After a long name its short form may follow; after a short one nothing does.
		if rest == "" || rest[0] == '=' || flag[0] == '|' && rest[0] == '/' {
			return line[strings.LastIndexByte(line[:i+1], '|'):end], true
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

// value looks at the value of a flag for what may be kept of it, and returns what the
// redacted line shows.
func (p *parser) value(name, value string) (shown string) {
	build := p.isBuild()
	switch name {
	case "platform":
		if plain(value) && p.scrub.keepText(value) {
			p.platform = value
		}
	case "target":
		if build && plain(value) && p.scrub.keepText(value) {
			p.target = value
		}
	case "tag":
		if build || p.command == "buildx imagetools create" {
			p.image(value)
		}
	case "image":
		if p.command == "service update" {
			p.image(value)
		}
	case "cache-from", "cache-to":
		p.cacheImage(value)
	case "output":
		p.outputImages(value)
	case "attest", "sbom":
		p.image(csvValue(value, "generator"))
	case "mount":
		if csvValue(value, "type") == "image" {
			p.image(csvValue(value, "source"))
			p.image(csvValue(value, "src"))
		}
	case "driver-opt":
		if p.command == "buildx create" {
			p.image(csvValue(value, "image"))
		}
	case "build-context":
		if _, ref, ok := strings.Cut(value, "=docker-image://"); ok {
			p.image(ref)
		}
	case "set":
		if key, v, ok := strings.Cut(value, "="); ok && p.isBake() {
			switch field := bakeField(key); field {
			case "tags":
				p.imageList(v)
			case "cache-from", "cache-to":
				p.cacheImage(v)
			case "output":
				p.outputImages(v)
			default:
				if ref, ok := strings.CutPrefix(v, "docker-image://"); ok && strings.HasPrefix(field, "contexts.") {
					p.image(ref)
				}
			}
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
	if !p.whole {
		return ""
	}
	return p.redactValue(name, value)
}

// cacheImage takes the image of a cache, which its reference alone may name; the builder
// without buildx takes several of those, apart by commas.
func (p *parser) cacheImage(value string) {
	if !strings.Contains(value, "=") {
		p.imageList(value)
	} else if csvValue(value, "type") == "registry" {
		p.image(csvValue(value, "ref"))
	}
}

// outputImages takes the images that an --output of a build names.
func (p *parser) outputImages(value string) {
	switch csvValue(value, "type") {
	case "image", "registry", "docker", "oci":
		p.imageList(csvValue(value, "name"))
	}
}

// bakeField returns what bake --set sets of its targets: tags for web.tags and for
// *.tags+, which appends. The names of targets have no dots.
func bakeField(key string) string {
	_, field, _ := strings.Cut(key, ".")
	return strings.TrimSuffix(field, "+")
}

// isBuild tells whether the command builds an image from a Dockerfile.
func (p *parser) isBuild() bool {
	switch p.command {
	case "build", "image build", "builder build", "buildx build", "buildx b", "buildx debug build", "buildx debug b", "buildx dap build":
		return true
	}
	return false
}

func (p *parser) isBake() bool {
	return p.command == "bake" || p.command == "buildx bake" || p.command == "buildx f" || p.command == "builder bake"
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

// image takes what stands where an image is named, and tells whether it is kept.
func (p *parser) image(ref string) bool {
	if len(p.images) == maxList {
		p.clipped = true
		return false
	}
	if !validReference(ref) || !p.scrub.keep(ref) {
		return false
	}
	p.images = append(p.images, ref)
	return true
}

// imageList takes several, apart by commas.
func (p *parser) imageList(refs string) {
	for refs != "" {
		var ref string
		ref, refs, _ = strings.Cut(refs, ",")
		p.image(ref)
	}
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
