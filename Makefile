# Everything on a fresh machine: `make demo` and `make test` find a Python, make the virtual environment, install, go.
#
#   make test PYTHON=python3.12        another Python (3.11 or newer)
#   make test PIP_FLAGS='...'          more options for pip, such as PyTorch's CPU wheel index (see CONTRIBUTING.md)
#   make fuzz FUZZ_SECONDS=600         a longer search

PYTHON ?=
VENV ?= .venv
PIP_FLAGS ?=
FUZZ_SECONDS ?= 30

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
STAGES := FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python tools/stages.py

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo demo-rounds demo-train test lint types imports fast slow fuzz packages bench format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1@/' | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(VENV)/.dev ## the virtual environment with everything for development

demo: $(VENV)/.runtime ## a swarm on this machine answers a prompt
	@$(BIN)/mycel demo

demo-rounds: $(VENV)/.runtime ## eight processes train by rounds: two lie, one is killed, one comes late; in under five minutes
	@$(BIN)/mycel demo --rounds docs/recipes/rounds.toml

demo-train: $(VENV)/.runtime ## six processes train a model, and lose a node of each stage; in under five minutes
	@$(BIN)/mycel demo --train docs/recipes/topics.toml

test: $(VENV)/.dev ## everything that CI checks
	@$(STAGES) lint types imports fast fuzz slow

lint types imports fast slow fuzz packages: $(VENV)/.dev
	@$(STAGES) $@

lint: ## ruff: rules and format
types: ## mypy --strict
imports: ## import-linter: the rooms and the rings
fast: ## the fast tests
slow: ## the slow tests: real processes, many architectures, packages
fuzz: ## hostile bytes, for FUZZ_SECONDS
packages: ## build sdist and wheels, install each into an empty environment, run it

bench: $(VENV)/.runtime ## tokens per second beside transformers' own generate (wants a quiet machine)
	@$(BIN)/python -m benchmarks.decode

format: $(VENV)/.dev ## let ruff rewrite what it can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean: ## remove the virtual environment, caches and builds
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find mycel tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python that is new enough and can make environments (some systems ship one without ensurepip).
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "== $(VENV): $$($$python --version)"; \
	        exec $$python -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo 'error: no Python 3.11 or newer with the venv module found; name one: make PYTHON=/path/to/python' >&2; exit 1

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo '== install: mycel and what it needs (torch is large; this takes a few minutes once)'
	@start=$$(date +%s); $(PIP_INSTALL) -e '.[train]' && echo "== install: $$(($$(date +%s) - start)) s"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo '== install: mycel, what it needs and the tools (torch is large; this takes a few minutes once)'
	@start=$$(date +%s); $(PIP_INSTALL) -e '.[dev,hivemind,train]' && echo "== install: $$(($$(date +%s) - start)) s"
	@touch $(VENV)/.runtime $@
