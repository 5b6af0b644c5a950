# Pageport's one entry point. `make` alone lists what there is.
#
#   demo    sets up this machine and moves a real guest over an emulated WAN
#   test    sets up this machine and passes the tests
#   verify  format, lints, tests, UI checks; changes nothing
#   fix     formats and applies the lints' suggestions
#   bench   measures; figures go to target/bench
#   bench-replication  only replication, next to qemu-img convert and QEMU's own mirror and backup
#   bench-controller  only three controllers with a large simulated fleet
#   faults  strikes a move with every fault at every point, on real processes, and simulates 100,000 schedules; goes on where it
#           was interrupted
#   faults-replication  strikes standing replication with every fault at seeded moments, on real processes; goes on where it was interrupted
#   simulate  only the schedules (SCHEDULES=1000 for fewer)
#
# Everything is built in one way (the whole workspace, the dev profile, which is optimised), so nothing is built twice.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test verify fix bench bench-replication bench-controller faults faults-replication simulate setup ui build guest lint ui-verify ui-test rust-test

UI := web-ui
UI_SOURCES := $(shell find $(UI)/src $(UI)/public $(UI)/index.html $(UI)/vite.config.ts $(UI)/svelte.config.js -type f 2>/dev/null)
LAB := target/debug/pageport-lab

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'
	@sed -n 's/^#   /  make /p' Makefile

# Debian packages: QEMU, filesystem tools, protoc, chromium's libraries come with their users below.
setup:
	@tools/setup.sh

$(UI)/node_modules/.package-lock.json: $(UI)/package-lock.json
	@echo "ui: installing npm packages"
	@cd $(UI) && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

$(UI)/dist/index.html: $(UI)/node_modules/.package-lock.json $(UI_SOURCES)
	@echo "ui: building the page"
	@cd $(UI) && npm run --silent build

ui: $(UI)/dist/index.html

build: setup
	@$(MAKE) --no-print-directory ui
	@echo "build: cargo build --workspace (a first build takes some minutes)"
	@cargo build --workspace --lib --bins --tests --locked

# The lab's guests: a Debian kernel, busybox and our own program, cached in target/lab/guest.
guest: build
	@$(LAB) guest

demo: guest
	@$(LAB) demo

test: guest ui-test rust-test

ui-test: build
	@cd $(UI) && npm run --silent test

# Last, so that the log ends in the test runner's summary.
rust-test: guest
	@tools/test.sh

verify: lint ui-verify test

lint: build
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --locked -- -D warnings
	@tools/deny.sh

ui-verify: ui
	@cd $(UI) && npm run --silent check && npm run --silent lint && npm run --silent check:gen
	@$(UI)/tools/install-chromium.sh
	@cd $(UI) && npm run --silent test:browser

fix: ui
	@cargo fmt --all
	@cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	@cd $(UI) && npm run --silent gen && npx eslint . --fix

bench: guest
	@tools/bench.sh

# BENCH='--rate 1000000000' measures something else; see target/debug/pageport-lab bench-replication --help.
bench-replication: guest
	@$(LAB) bench-replication $(BENCH)

# BENCH='--fleet 30/300' measures something else; see target/debug/pageport-lab bench-controller --help.
bench-controller: build
	@$(LAB) bench-controller $(BENCH)

# FAULTS='--only memory' runs a part; see target/debug/pageport-lab faults --help.
faults: guest simulate
	@$(LAB) faults $(FAULTS)

# FAULTS='--only cut-both' runs a part; see target/debug/pageport-lab faults-replication --help.
faults-replication: guest
	@$(LAB) faults-replication $(FAULTS)

SCHEDULES := 100000
# The name of what is checked out, as the lab writes it: "+" if files differ from it.
COMMIT = $(shell git describe --always --abbrev=40 --exclude='*' --dirty=+)

simulate: build
	@target/debug/pageport-sim run --schedules $(SCHEDULES) --results target/faults/simulation.jsonl --commit "$(COMMIT)"
