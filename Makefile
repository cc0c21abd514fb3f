# Tallyman. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

GO ?= go
# Two at a time: the smallest runners have two cores, and more only starves the timing tests.
PARALLEL ?= 2
FUZZTIME ?= 20s
FUZZREDACTION ?= 1000000x

CACHE := $(CURDIR)/.cache
ACT_VERSION := v0.2.89
STATICCHECK_VERSION := v0.8.2
NFPM_VERSION := v2.45.2
SBOM_VERSION := v1.10.0
ACTIONLINT_VERSION := v1.7.12
GOVULNCHECK_VERSION := v1.9.0
# The version is part of the path, so that a new version is installed by itself.
ACT := $(CACHE)/bin/act-$(ACT_VERSION)/act
STATICCHECK := $(CACHE)/bin/staticcheck-$(STATICCHECK_VERSION)/staticcheck
NFPM := $(CACHE)/bin/nfpm-$(NFPM_VERSION)/nfpm
SBOM := $(CACHE)/bin/cyclonedx-gomod-$(SBOM_VERSION)/cyclonedx-gomod
ACTIONLINT := $(CACHE)/bin/actionlint-$(ACTIONLINT_VERSION)/actionlint
# What tests of fault cases found, see internal/faults.
FAULTS := $(CACHE)/faults
export STATICCHECK_CACHE := $(CACHE)/staticcheck
# Under sudo, git refuses to tell Go about a clone that another user owns.
export GOFLAGS := -buildvcs=false $(filter-out -buildvcs=%,$(GOFLAGS))
GIT := git -c safe.directory=*

VERSION := $(shell $(GIT) describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT := $(shell $(GIT) rev-parse --short=12 HEAD 2>/dev/null || echo unknown)

# A Docker daemon needs root. Where the caller is not root but may become it without
# a password, only the demo and the end-to-end tests do; nothing else is built as root.
# Shims count some losses in the kernel, for the agent of the whole IPC name space: what
# runs here shall neither see nor leave such counts. Nor shall it inherit ignored signals
# (of nohup, or of a shell's background), because the tests send them to what they start.
ALONE = $(ROOT) env --default-signal unshare --ipc
ROOT = $(shell [ "$$(id -u)" = 0 ] || ! sudo -n true 2>/dev/null || echo 'sudo -n -E env PATH=$(PATH)')

SCRIPTS := $(wildcard scripts/*.sh runner-image/*.sh runner-image/hooks/*.sh packaging/*.sh packaging/scripts/*.sh) .ci/run
UNITS = $(shell $(GO) list ./... | grep -v '/tallyman/\(e2e\|demo\)')

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## Build bin/docker-shim and bin/tallyman
	@mkdir -p bin
	$(GO) run ./internal/leanbuild -o bin/docker-shim ./cmd/docker-shim
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)" -o bin/tallyman ./cmd/tallyman

# DuckDB is C++: cgo, and a binary for the machine that builds it only.
.PHONY: desk
desk: ## Build bin/tallyman-desk (wants a C++ compiler)
	@mkdir -p bin
	CGO_ENABLED=1 $(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)" -o bin/tallyman-desk ./cmd/tallyman-desk

.PHONY: setup
setup: ## Install what demo and tests need by apt (root), or say what is missing
	@scripts/setup.sh git:git dockerd:docker.io docker:docker.io docker-registry:docker-registry busybox:busybox-static \
		iptables:iptables strace:strace jq:jq shellcheck:shellcheck \
		mkfs.ext4:e2fsprogs node:nodejs npm:npm rpm:rpm
	@scripts/setup.sh chromium:chromium || echo "setup: no Chromium by apt here; the browser tests take google-chrome too" >&2

.PHONY: demo
demo: ## Run a real workflow on a private Docker daemon and print its account (root)
	@scripts/setup.sh git:git dockerd:docker.io docker:docker.io docker-registry:docker-registry busybox:busybox-static
	@$(MAKE) build $(ACT)
	@$(GO) build -o $(CACHE)/bin/demo ./demo
	@$(ALONE) $(CACHE)/bin/demo -act $(ACT)

.PHONY: test
test: faults-clean setup lint unit manifests browser e2e demo faults ## Everything that continuous integration runs

.PHONY: unit
unit: ## Unit tests with the race detector, seeds of the fuzz tests included
	@mkdir -p $(FAULTS)
	TALLYMAN_FAULTS_DIR=$(FAULTS) $(GO) test -race -count 1 -p $(PARALLEL) -timeout 20m -exec 'env --default-signal $(if $(filter 0,$(shell id -u)),unshare --ipc)' $(UNITS)

# Not part of make test: the analyser alone takes two cores minutes to compile, and 6 GB. There
# bq/analyse/analysed.sum stands for it, see internal/analysed; continuous integration has a job for it.
.PHONY: sql
sql: ## Every view and panel through the analyser of GoogleSQL (the first time takes minutes to compile); UPDATE=1 keeps what passed
	cd bq/analyse && $(GO) vet ./... && $(GO) test -count 1 ./... $(if $(UPDATE),-update)

.PHONY: e2e
e2e: build $(NFPM) $(SBOM) ## End-to-end tests on a private Docker daemon (root)
	@mkdir -p $(FAULTS)
	TALLYMAN_FAULTS_DIR=$(FAULTS) TALLYMAN_E2E_BIN=$(CURDIR)/bin $(GO) test -race -v -count 1 -p $(PARALLEL) -timeout 20m -exec '$(ALONE)' ./e2e/...

# A module of its own: the driver of the browser is no dependency of Tallyman.
.PHONY: browser
browser: ## The desk's page in a headless Chromium; TALLYMAN_SCREENSHOTS keeps pictures of it
	cd e2e/browser && $(GO) vet ./... && $(GO) test -race -count 1 -timeout 20m ./...

# Also a module of its own, for the types of Kubernetes and goreleaser.
.PHONY: manifests
manifests: ## Values of the Helm chart, manifests and .goreleaser.yaml against the types of their readers
	cd e2e/manifests && $(GO) vet ./... && $(GO) test -count 1 ./...

.PHONY: vulncheck
vulncheck: ## Known vulnerabilities that our code calls, from vuln.go.dev
	@mkdir -p $(CACHE)
	@$(GO) run golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION) -format json ./... >$(CACHE)/vulnerabilities.json || \
		{ echo "govulncheck could not scan: it asks https://vuln.go.dev, which must be reached" >&2; exit 1; }
	$(GO) run ./packaging/vulncheck packaging/vulncheck/accepted.txt <$(CACHE)/vulnerabilities.json

# Programs of another version and of this one, each in a folder, for a test that exchanges them.
.PHONY: skew
skew: build ## A job during whose run Tallyman is upgraded from OLD (a revision) to this version, and back (root)
	@[ -n "$(OLD)" ] || { echo "make skew OLD=REVISION, a tag for example" >&2; exit 2; }
	@rm -rf $(CACHE)/skew && $(GIT) clone --quiet --no-checkout . $(CACHE)/skew/src && $(GIT) -C $(CACHE)/skew/src checkout --quiet "$$($(GIT) rev-parse '$(OLD)^{commit}')"
	@$(MAKE) -C $(CACHE)/skew/src build && mv $(CACHE)/skew/src/bin $(CACHE)/skew/bin && rm -rf $(CACHE)/skew/src
	TALLYMAN_E2E_OLD=$(CACHE)/skew/bin TALLYMAN_E2E_BIN=$(CURDIR)/bin $(GO) test -v -count 1 -exec '$(ALONE)' -run UpgradeDuringAJob ./e2e

.PHONY: faults-clean
faults-clean:
	@rm -rf $(FAULTS)

.PHONY: faults
faults: ## See that every case of the fault catalogue ran in the last make test
	@$(GO) run ./internal/gen/faultsgen -results $(FAULTS)

.PHONY: faults-doc
faults-doc: ## Write docs/faults.md from the last make test
	@$(GO) run ./internal/gen/faultsgen -results $(FAULTS) -write

.PHONY: bench
bench: build ## What the shim adds to a command, beside a shell wrapper, in one interleaved run
	$(GO) run ./wrapper/shimbench -shim bin/docker-shim -tallyman bin/tallyman

.PHONY: bench-events
bench-events: build ## CPU and memory for each daemon event, beside docker events piped into Python
	$(GO) run ./events/intakebench

.PHONY: bench-bounds
bench-bounds: build ## Latency with full, frozen and stalled parts, memory at overload, the daemon's API (root)
	@$(GO) build -o $(CACHE)/bin/boundsbench ./e2e/boundsbench
	@$(ALONE) $(CACHE)/bin/boundsbench

.PHONY: bench-import
bench-import: ## Rows per second and peak memory of imports, 1 and 10 million rows of each format
	@$(GO) build -o $(CACHE)/bin/importbench ./desk/importer/importbench
	@$(CACHE)/bin/importbench

# Needs room for the records and for the database of them, 10 GB for ten million, in TMPDIR.
.PHONY: bench-desk
bench-desk: ## Time of each question, and peak memory, on 10 million records (TALLYMAN_DESK_RECORDS=N: as many)
	TALLYMAN_DESK_RECORDS=$${TALLYMAN_DESK_RECORDS:-10000000} $(GO) test -count 1 -v -timeout 30m -run QuestionsOfAFleet ./desk/store

.PHONY: packages
packages: $(NFPM) $(SBOM) ## .deb, .rpm, tarballs, SBOMs and SHA256SUMS of this commit in dist, for amd64 and arm64
	packaging/build.sh $(NFPM) $(SBOM)
	@cat dist/SHA256SUMS

# By itself, because it wants a C++ compiler, and is for this machine's architecture.
.PHONY: packages-desk
packages-desk: $(NFPM) $(SBOM) ## .deb, .rpm, tarball and SBOM of the desk in dist, after make packages (wants a C++ compiler)
	packaging/desk.sh $(NFPM) $(SBOM)
	@cat dist/SHA256SUMS

.PHONY: bench-blame
bench-blame: ## Ranking of suspects in simulated fleets whose guilty are known, beside the count of overlaps
	@$(GO) build -o $(CACHE)/bin/blamebench ./blame/blamebench
	@$(CACHE)/bin/blamebench

.PHONY: footprint
footprint: ## Size of the programs, what each sink costs, the agent's memory, what an image grows by
	$(GO) run ./packaging/footprint

.PHONY: crash
crash: build ## Kill at every system call, and 200 runners beside an adopter: all points, not a sample (root)
	TALLYMAN_CRASH=all TALLYMAN_ADOPT_RUNS=200 TALLYMAN_E2E_BIN=$(CURDIR)/bin $(GO) test -v -count 1 -p 1 -timeout 90m -exec '$(ALONE)' \
		-run 'Crash|Kill|PowerCut|StartsOver|Adopted|EachSystemCall' ./journal ./sinks ./e2e ./e2e/faults

# The tests of package sinks with a larger load; the table is in their output.
.PHONY: bench-sinks
bench-sinks: ## 100,000 records to each sink, servers killed three times: losses, rate, CPU, memory; delays beside a dead sink
	TALLYMAN_SINK_RECORDS=100000 $(GO) test -p 1 -count 1 -v -timeout 30m -run 'ALoad|Killed|Emulator' \
		./sinks ./sinks/fluent ./sinks/pubsub ./sinks/cloudlogging | grep -E '^ *\| |^(ok|FAIL|---)'
	$(GO) test -run '^$$' -bench BesideADead -benchtime 1x -v ./sinks/fluent | grep -E '^ *\| |^(ok|FAIL|---)'

.PHONY: fuzz
fuzz: ## Run each fuzz test for FUZZTIME (20s), that of redaction for FUZZREDACTION (a million lines)
	@grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u | while read -r dir; do \
		for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' "$$dir"/*_test.go); do \
			case $$name in FuzzRedaction) time=$(FUZZREDACTION) ;; *) time=$(FUZZTIME) ;; esac; \
			echo "== $$dir $$name"; $(GO) test -run '^$$' -fuzz "^$$name$$" -fuzztime $$time -parallel $(PARALLEL) "$$dir" || exit 1; \
		done; \
	done

.PHONY: lint
lint: $(STATICCHECK) $(ACTIONLINT) ## gofmt, go vet, staticcheck, actionlint, shellcheck
	@unformatted=$$(gofmt -l $$($(GIT) ls-files -co --exclude-standard '*.go')); \
		if [ -n "$$unformatted" ]; then echo "gofmt -w wanted: $$unformatted" >&2; exit 1; fi
	$(GO) vet ./...
	$(STATICCHECK) ./...
	$(ACTIONLINT) .github/workflows/*.yml
	@if command -v shellcheck >/dev/null; then set -x; shellcheck $(SCRIPTS); else echo "lint: no shellcheck here, the scripts were not looked at" >&2; fi

.PHONY: generate
generate: ## Write the generated files again
	$(GO) generate ./...

.PHONY: clean
clean: ## Remove binaries, the demo's folder and downloaded tools
	$(if $(wildcard .demo),$(ROOT)) rm -rf .demo
	rm -rf bin .cache

$(ACT):
	@echo "setup: building act $(ACT_VERSION), once" >&2
	@GOBIN=$(@D) $(GO) install github.com/nektos/act@$(ACT_VERSION)

$(STATICCHECK):
	@echo "setup: building staticcheck $(STATICCHECK_VERSION), once" >&2
	@GOBIN=$(@D) $(GO) install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION)

$(NFPM):
	@echo "setup: building nfpm $(NFPM_VERSION), once" >&2
	@GOBIN=$(@D) $(GO) install github.com/goreleaser/nfpm/v2/cmd/nfpm@$(NFPM_VERSION)

$(SBOM):
	@echo "setup: building cyclonedx-gomod $(SBOM_VERSION), once" >&2
	@GOBIN=$(@D) $(GO) install github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@$(SBOM_VERSION)

$(ACTIONLINT):
	@echo "setup: building actionlint $(ACTIONLINT_VERSION), once" >&2
	@GOBIN=$(@D) $(GO) install github.com/rhysd/actionlint/cmd/actionlint@$(ACTIONLINT_VERSION)
