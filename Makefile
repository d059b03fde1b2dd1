# Every target sets up what it needs in .venv; nothing else has to be installed than Python 3.11-3.13 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format bench docs soak clean

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 14

setup: $(DEV) ## Install everything that a contributor needs

quickstart: $(BASE) ## Train a small model by GRPO from poor to good (4 minutes on 2 cores)
	$(BIN)/python examples/quickstart/quickstart.py

test: $(DEV) ## Run the tests
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

check: $(DEV) ## Check format, lint, types and import arrows (under a minute)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(DEV) ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BASE) ## Run the benchmarks, briefly (in full: without --quick)
	$(BIN)/python benchmarks/engine_overhead.py --quick
	$(BIN)/python benchmarks/grpo_step.py --quick
	$(BIN)/python benchmarks/recording.py --quick
	$(BIN)/python benchmarks/sync_proof.py --quick
	$(BIN)/python benchmarks/flow_checker.py --quick
	$(BIN)/python benchmarks/checkpoint.py --quick

docs: $(DEV) ## Check that links and paths in the documentation lead somewhere
	$(BIN)/python docs/check.py

soak: $(DEV) ## Run the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak || test $$? -eq 5

clean: ## Remove what the tools leave behind, .venv excepted
	rm -rf build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || { echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is none of them: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e ".[tasks]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e ".[dev,lora,tasks]"
	@touch $@ $(BASE)
