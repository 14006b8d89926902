# One virtual environment, .venv, made by whichever target needs it first and renewed when the versions change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
OUT ?= demo

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait must not spin: on a busy machine that costs five to fifteen times.
export OMP_WAIT_POLICY := PASSIVE
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format types bench docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 16

setup: $(READY)  ## only make the environment

demo: $(READY)  ## star, finetune and joint on built-in data, into demo/
	$(BIN)/perdure demo --out $(OUT)

test: $(READY)  ## all tests but those that need a GPU or minutes
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not gpu and not slow" $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

bench: $(READY)  ## every benchmark, one after another
	@set -e; for file in $(sort $(wildcard benchmarks/[a-z]*.py)); do echo "== $$file"; HF_HUB_OFFLINE=1 $(BIN)/python "$$file"; done

docs: $(READY)  ## write docs/reference/ again from the schema and the tables
	$(BIN)/python scripts/write_reference.py docs/reference

clean:  ## everything that can be made again
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { \
	  echo "error: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old; Perdure needs 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "making $(VENV): some minutes the first time (PyTorch is large)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,track,features,clip,diffusion,sign,volumes]'
	@touch $@
