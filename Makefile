# The commands of this project. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RANKS  ?= 2
# Test files that run at once: much of a test is waiting and starting.
WORKERS ?= 2
SOURCES := $(shell find crates python build_backend -type f \( -name '*.rs' -o -name '*.py' -o -name '*.pyi' -o -name '*.toml' -o -name 'py.typed' \)) \
           Cargo.toml Cargo.lock pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help venv wheel train test test-rust build-tests test-python check check-rust check-python types api format bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(VENV)/installed ## Make .venv: torch and our wheel (downloads torch once)

$(VENV)/requirements: requirements-dev.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the tools of the tests into $(VENV) (a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	@echo "building the wheel (Rust, release profile)"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall .
	@touch $@

wheel: $(VENV)/requirements ## Build the wheel into dist/
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@$(PYTHON) tools/check_wheel.py dist/*.whl

train: venv ## Train a GPT on real text: 2 ranks, bf16, ZeRO-2
	$(BIN)/deepspeed --num_gpus $(RANKS) examples/gpt/train.py \
	    --deepspeed --deepspeed_config examples/gpt/ds_config.json $(ARGS)

test: test-rust test-python ## Run all tests

test-rust: ## Run the Rust tests: no Python, no torch, no GPU
	cargo test --workspace --quiet

build-tests: check-rust
	cargo test --workspace --quiet --no-run

test-python: venv ## Run the Python tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile tests benches $(ARGS)

check: check-rust check-python ## Check formatting, lints, types and the share of Python

check-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

check-python: $(VENV)/requirements
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/mypy tests/python/typing/user_script.py
	@$(PYTHON) tools/source_share.py

types: $(VENV)/requirements ## Check with pyright what scripts see of the package (downloads pyright and node)
	$(BIN)/pip install --quiet --disable-pip-version-check pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

api: venv ## Write docs/api.md from the docstrings
	$(BIN)/python tools/api_reference.py

format: $(VENV)/requirements ## Format everything
	cargo fmt --all
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --fix --quiet .

bench: venv ## Compare with the original, torch DDP and a plain copy (installs the original once)
	@test -x .peer/bin/python || sh benches/peer-venv.sh .peer
	DS_PEER_VENV=.peer $(BIN)/python benches/run.py $(ARGS)

clean: ## Remove what was built; .venv stays
	rm -rf target build dist
