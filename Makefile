# The two commands: `make race` trains the optimizers on real text and writes a report;
# `make test` runs the whole suite. Both make the environment once, in $(VENV).
# `make bench` measures the steps beside other packages' optimizers, which it installs there too;
# `steepest bench` measures them on your model.
PYTHON ?= python3
VENV   ?= .venv
BUDGET ?= 8m
OUT    ?= runs/race
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := $(VENV)/.peers
DOCS   := $(VENV)/.docs
ALONE  := tests/integrations/no-deps.txt

.PHONY: race bench test stacks fuzz kill lint docs docs-serve clean
.DELETE_ON_ERROR:

race: $(READY)
	$(BIN)/steepest race --budget $(BUDGET) --out $(OUT)

bench: $(PEERS)
	$(BIN)/python -m benchmarks.steps

# A process for every core, each with one thread: the tests' tensors are tiny, and threads that wait for each
# other stall. Neighbouring tests stay in one process (worksteal), so that they share compiled code and
# fixtures. TESTS picks files or a directory, JOBS=0 runs all in one process, which a debugger needs.
# Some start processes, which take over what the first has compiled, whatever the caller's environment says.
TESTS ?=
JOBS  ?= auto
test: export PYTHONDONTWRITEBYTECODE =
test: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal $(TESTS)

# Frameworks that pin other releases than the tests': an environment of its own for each, .venv-NAME, made from
# tests/integrations/stacks/NAME.txt, and in it the framework's tests. `make stack-NAME` does one of them.
STACKS := axolotl llm-foundry ms-swift
RUNS   := $(STACKS:%=stack-%)
.PHONY: $(RUNS)
stacks: $(RUNS)

$(RUNS): stack-%: .venv-%/.ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests/integrations/test_$(subst -,_,$*).py

# The file lists every package but torch and pytest, which go in first with what they need. So nothing is resolved
# anew, and the file may leave out what needs a GPU or contradicts torch.
.venv-%/.ready: tests/integrations/stacks/%.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt torch pytest
	.venv-$*/bin/python -m pip install --quiet --no-deps --requirement $<
	.venv-$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The suite kills a process that saves 300 times; this, many more.
KILLS ?= 5000
kill: $(READY)
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m trust.kill_saves $$(mktemp -d) $(KILLS)

# Cases beyond the suite's fixed few hundred, with new random seeds each time; a failure prints how to repeat it.
CASES ?= 12000
fuzz: $(READY)
	OMP_NUM_THREADS=1 STEEPEST_FUZZ=$(CASES) $(BIN)/python -m pytest --hypothesis-show-statistics tests/fuzz

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A link, an anchor or a reference that leads nowhere fails. The site is in build/site; nothing in it is loaded
# from elsewhere. With --quiet, warnings would not count. The switch turns off a notice about the successor of these
# packages.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)
	$(BIN)/mkdocs build

docs-serve: $(DOCS)
	$(BIN)/mkdocs serve

# torch goes in first, alone and pinned: resolved together with the rest, a range could take another
# release than the one that is tested. Which build pip takes is up to its index: on Linux the default
# one brings the CUDA libraries; point PIP_INDEX_URL or --find-links at a CPU build to do without.
# Frameworks that pin other releases than the tests' come last, alone: see tests/integrations/no-deps.txt.
# A venv without pip (Debian's python3 without python3-venv makes one) is made anew.
$(READY): pyproject.toml constraints.txt $(ALONE)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab,dev,parity,integrations]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --requirement $(ALONE)
	touch $@

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab,peers]"
	touch $@

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
