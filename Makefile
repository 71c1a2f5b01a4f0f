# `make demo` and `make test` set up everything they need on a fresh Debian 12 with a Rust toolchain.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := src/polytropo/_bin
CARGO_JOBS ?= 2
export CARGO_BUILD_JOBS := $(CARGO_JOBS)

# Programs that the product needs, and what only its tests and benchmarks need.
PACKAGES := runc crun fuse3 mmdebstrap umoci uidmap conmon golang-github-containers-common python3-venv build-essential
TEST_PACKAGES := busybox-static acl attr dbench fio git musl-tools libpython3.11-testsuite postgresql python3.11 redis-server rsync stress-ng e2fsprogs xfsprogs
CACHE_BENCH_PACKAGES := git strace build-essential
BENCH_PACKAGES := fuse-overlayfs podman rocksdb-tools strace

.PHONY: all bootstrap product-bootstrap build venv demo lint test rust-test python-test soak bench-fuse clean uninstall

all: build venv

bootstrap:
	@tools/bootstrap $(PACKAGES) $(TEST_PACKAGES)

build:
	@tools/check-toolchain
	cargo build --release --locked
	@mkdir -p $(BIN)
	@for program in polytropo-service polytropo-sites; do \
	    if [ -f target/release/$$program ]; then install -m 0755 target/release/$$program $(BIN)/; fi; done
	@tools/build-preload $(BIN)
	@install -m 0755 target/release/libpolytropo_python.so src/polytropo/_native.abi3.so

$(VENV)/.ready: pyproject.toml
	@tools/make-venv $(VENV)
	@touch $@

venv: $(VENV)/.ready
	@# Compiled here, since some environments keep Python from doing it at first use, which costs every command 30 ms.
	@$(VENV)/bin/python -m compileall -q src/polytropo

lint: venv
	cargo fmt --check
	cargo fmt --check --manifest-path crates/preload/freestanding/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

rust-test:
	cargo test --locked
	POLYTROPO_TEST_FUSE_TRANSPORT=uring cargo test --locked -p polytropo-service --test fuse

# Every interleaving of small cases of the queues, windows, epochs and posted writes, and many of larger ones, in target directories of their own since compiler flags differ.
.PHONY: loom
loom:
	RUSTFLAGS="--cfg modeled --cfg loom" cargo test --locked --release -p polytropo-queue --test loom --target-dir target/loom
	RUSTFLAGS="--cfg modeled --cfg loom" cargo test --locked --release -p polytropo-wire --test loom --test posts --test windows --test answers --test marks --target-dir target/loom
	RUSTFLAGS="--cfg modeled --cfg shuttle" cargo test --locked --release -p polytropo-queue --test shuttle --target-dir target/shuttle

python-test: build venv
	$(VENV)/bin/pytest

test: bootstrap build venv lint rust-test loom python-test

# Two tenants at work, in a state directory of its own; KEEP=1 keeps it.
demo: product-bootstrap build venv
	$(VENV)/bin/python -m demo

product-bootstrap:
	@tools/bootstrap $(PACKAGES)

# The long forms: many seeds, many rounds, many kills.
soak: bootstrap build venv aarch64
	POLYTROPO_MODEL_CASES=10000 cargo test --release --locked -- --include-ignored
	SHUTTLE_ROUNDS=20000 $(MAKE) loom
	$(VENV)/bin/pytest -m soak

bench-fuse: product-bootstrap build venv
	@tools/bootstrap $(BENCH_PACKAGES) git
	$(VENV)/bin/python -m benchmarks.fuse $(BENCH_ARGUMENTS)

.PHONY: bench-cache
bench-cache: venv
	@tools/bootstrap $(CACHE_BENCH_PACKAGES)
	$(VENV)/bin/python -m benchmarks.cache $(BENCH_ARGUMENTS)

.PHONY: bench-path
bench-path: product-bootstrap build venv
	@tools/bootstrap $(BENCH_PACKAGES) git
	$(VENV)/bin/python -m benchmarks.path $(BENCH_ARGUMENTS)

# Stops what runs, removes state, caches and builds. Refuses while there are volumes or containers, unless FORCE=1.
uninstall:
	@FORCE=$(FORCE) tools/uninstall $(VENV)
	@$(MAKE) --no-print-directory clean

clean:
	cargo clean
	rm -rf $(VENV) $(BIN) src/polytropo/_native.abi3.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks demo examples src tests -name __pycache__ -prune -exec rm -r {} +

QUEUE_BENCH_PACKAGES := libboost-dev libconcurrentqueue-dev

.PHONY: bench-queues
bench-queues: build venv
	@tools/bootstrap $(QUEUE_BENCH_PACKAGES)
	$(VENV)/bin/python -m benchmarks.queues $(BENCH_ARGUMENTS)

# The crates that promise it, on AArch64 as QEMU plays it.
AARCH64_PACKAGES := qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross
.PHONY: aarch64
aarch64:
	@tools/bootstrap $(AARCH64_PACKAGES)
	@if rustup target add aarch64-unknown-linux-gnu >/dev/null 2>&1; then \
	    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu" \
	        cargo test --locked -p polytropo-copy --target aarch64-unknown-linux-gnu --target-dir target/aarch64; \
	else echo "aarch64: skipped, its standard library is not to be had (rustup target add aarch64-unknown-linux-gnu)"; fi

.PHONY: bench-copy
bench-copy: build venv
	$(VENV)/bin/python -m benchmarks.copy $(BENCH_ARGUMENTS)

# Under Miri, where it is installed: the queues' unsafe code; names, words and the emitter of copies, and their plans as on AArch64
# (elsewhere they ask the processor, which Miri has none of).
.PHONY: miri
miri:
	@if cargo +nightly miri --version >/dev/null 2>&1; then \
	    set -e; export MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=8; \
	    cargo +nightly miri test --locked -p polytropo-queue --test words --test bytes --test wrap --target-dir target/miri; \
	    cargo +nightly miri test --locked -p polytropo-copy --test pure --target-dir target/miri; \
	    cargo +nightly miri test --locked -p polytropo-copy --test pure --test plan --target-dir target/miri \
	        --target aarch64-unknown-linux-gnu; \
	else echo "miri: skipped, it is not installed (rustup +nightly component add miri)"; fi
