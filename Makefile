# What people type. Everything runs with Rust and make; `make test` makes what else it needs under ~/.cache/wharf.
# CARGO_TARGET_DIR is respected.

.DEFAULT_GOAL := help
.PHONY: help demo demo-mlserver reload-overhead test prove test-benches bench bench-quick soak lint fmt clippy doc clients servers

CARGO ?= cargo
target := $(or $(CARGO_TARGET_DIR),target)

help: ## list these
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## play the life of a model in one process, and check what is promised
	$(CARGO) build --bin wharf
	$(target)/debug/wharf demo

demo-mlserver: ## the same with two MLServers that Wharf starts; installs MLServer and rclone under ~/.cache/wharf
	$(CARGO) build --bin wharf
	installed=$$(tests/servers/setup.sh mlserver rclone) && eval "$$installed" && \
	$(target)/debug/wharf demo --mlserver "$${mlserver%/*}/mlserver" --rclone "$$rclone" --models "$$models"

reload-overhead: servers ## how much longer a reload takes through Wharf than by the inference server itself: the README's table
	$(CARGO) build --release --bin wharf
	WHARF_PROGRAM=$(abspath $(target))/release/wharf WHARF_PROVE=1 $(CARGO) test --test overhead -- --nocapture

test: clients servers ## every test, in reduced counts
	$(CARGO) test --no-fail-fast

prove: clients servers ## every test in full counts; writes docs/proof.md from scratch
	rm -f docs/proof.md
	WHARF_PROVE=1 WHARF_PROOF=$(CURDIR)/docs/proof.md $(CARGO) test --no-fail-fast

test-benches: ## the tests of the benches themselves
	$(CARGO) test -p wharf-bench

bench: ## every figure beside its goal and its rival; keeps them under benches/results
	$(CARGO) build --release --workspace
	$(target)/release/wharf-bench run

bench-quick: ## a few minutes of it: fails where a ratio, or a count of instructions, is worse than in the last result
	$(CARGO) build --release --workspace
	$(target)/release/wharf-bench run --quick

soak: ## half an hour of everything at once, with 10,000 models; says what is left of it
	$(CARGO) build --release --workspace
	$(target)/release/wharf-bench soak

lint: fmt clippy doc ## formatting, clippy and documentation, warnings denied

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

# The clients of others that tests use, in an environment of their own.
clients:
	@if [ -x tests/clients/setup.sh ]; then tests/clients/setup.sh; fi

servers: ## MLServer, Triton and ONNX Runtime, which tests use: installs them under ~/.cache/wharf
	@tests/servers/setup.sh mlserver triton
	@tests/servers/onnxruntime.sh
