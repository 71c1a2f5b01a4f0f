# `make demo` and `make test` set up everything they need on a fresh Debian 12 with a Rust toolchain.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := src/polytropo/_bin
CARGO_JOBS ?= 2
export CARGO_BUILD_JOBS := $(CARGO_JOBS)

# Programs that the product needs, and what only its tests and benchmarks need.
PACKAGES := runc crun fuse3 mmdebstrap umoci uidmap golang-github-containers-common python3-venv build-essential
TEST_PACKAGES := acl attr

.PHONY: all bootstrap build venv lint test rust-test python-test clean

all: build venv

bootstrap:
	@tools/bootstrap $(PACKAGES) $(TEST_PACKAGES)

build:
	@tools/check-toolchain
	cargo build --release --locked
	@mkdir -p $(BIN)
	@for program in polytropo-service; do \
	    if [ -f target/release/$$program ]; then install -m 0755 target/release/$$program $(BIN)/; fi; done

$(VENV)/.ready: pyproject.toml
	@tools/make-venv $(VENV)
	@touch $@

venv: $(VENV)/.ready

lint: venv
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/mypy

rust-test:
	cargo test --locked

python-test: build venv
	$(VENV)/bin/pytest

test: bootstrap build venv lint rust-test python-test

clean:
	cargo clean
	rm -rf $(VENV) $(BIN)
