# The two commands: `make race` trains every optimizer on real text and writes a report;
# `make test` runs the whole suite. Both make the environment once, in $(VENV).
PYTHON ?= python3
VENV   ?= .venv
BUDGET ?= 5m
OUT    ?= runs/race
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: race test lint clean
.DELETE_ON_ERROR:

race: $(READY)
	$(BIN)/steepest race --budget $(BUDGET) --out $(OUT)

# One thread: the tests' tensors are tiny, and on a shared machine threads that wait for each other stall.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes in first, alone and pinned: resolved together with the rest, a range that admits a
# newer release would fetch gigabytes of GPU packages.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab,dev,peers]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
