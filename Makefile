# Two commands on a fresh machine: `make demo` trains, `make test` proves. Both build .venv first. `make test-all` also
# runs the tests that take long, `make docs` builds the documentation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --durations=30
IN_PARALLEL := --numprocesses 3 --dist worksteal
NEXT_PYTHON ?= python3.12
NEXT_VENV ?= .venv-next
NEXT_BIN := $(NEXT_VENV)/bin
NEXT_STAMP := $(NEXT_VENV)/.installed
# The tested set of versions; `CONSTRAINTS=/dev/null` takes the newest that pyproject.toml admits.
CONSTRAINTS ?= requirements/constraints.txt
# setuptools warns at every editable install that imports may find folders of the working directory first.
EDITABLE := PYTHONWARNINGS=ignore:Editable

IN_ONE_PIECE := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

# Threads that wait in a loop take the core that the one they wait for needs, when machines are small or shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-all test-rest test-next check style types types-of-examples imports docs quickstart constraints s3 format clean

$(STAMP): pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing PyTorch and the other requirements into $(VENV): some minutes, 7 GB"
	@$(EDITABLE) $(BIN)/python -m pip install --progress-bar off --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python demo.py

# Everything that needs no test to run: two at a time, each with its output in one piece.
check: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 2 $(IN_ONE_PIECE) types types-of-examples style imports docs

style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell prep streaming_rwkv kernels yamls docs tests tools bench examples README.md demo.py train.py

types: $(STAMP)
	$(BIN)/mypy

types-of-examples: $(STAMP)
	$(BIN)/mypy --strict --follow-imports=silent --cache-dir .mypy_cache/examples examples

imports: $(STAMP)
	$(BIN)/lint-imports

# All fast tests, and of the slow ones those that go from end to end: whole runs with real kills, object storage and two
# processes. Each worker begins with its part of the tests, whose fixtures and compiled kernels it then has for itself,
# and takes from the others' parts when its own is done. Three workers keep two cores busy: tests of storage wait much.
test: check
	$(PYTEST) -m "not slow or end_to_end" $(IN_PARALLEL)

# Everything: `test`, then each further kill, fault and engine; those come last that need the machine for themselves.
test-all: test test-rest

# Only files that have such tests are read: each worker imports all files that it is given.
test-rest: $(STAMP)
	$(PYTEST) -m "slow and not end_to_end and not alone" $(IN_PARALLEL) $$(grep -rlE 'mark\.(slow|alone)' tests --include='test_*.py' | sort)
	$(PYTEST) -m alone $$(grep -rl 'mark\.alone' tests --include='test_*.py' | sort)

# The fast tests on newer software than Composer's and Streaming's pins admit: Python 3.12, torch 2.11, transformers 5.
test-next: $(NEXT_STAMP)
	$(NEXT_BIN)/python -m pytest -m "not slow" $(IN_PARALLEL)

$(NEXT_STAMP): pyproject.toml requirements/next.txt requirements/next-no-deps.txt
	$(NEXT_PYTHON) -m venv $(NEXT_VENV)
	$(NEXT_BIN)/python -m pip install --quiet --upgrade pip
	$(EDITABLE) $(NEXT_BIN)/python -m pip install --progress-bar off --quiet --requirement requirements/next.txt --editable .
	$(NEXT_BIN)/python -m pip install --progress-bar off --quiet --no-deps --requirement requirements/next-no-deps.txt
	touch $(NEXT_STAMP)

# The documentation as a site, in site/, without the network; warnings, such as broken links, are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The quickstarts of README and docs, command by command, in a clean clone.
quickstart: $(STAMP)
	$(BIN)/python -m tools.quickstart --environment $(VENV)

# Write requirements/constraints.txt from .venv, after the tests have passed with these versions.
constraints: $(STAMP)
	$(BIN)/python -m tools.constraints

# A real S3 server for hand trials, until Ctrl-C; prints the environment to export. The store is thrown away.
s3: $(STAMP)
	$(BIN)/python -m tools.s3_server

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEXT_VENV) demo-out site
