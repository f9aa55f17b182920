# Two commands on a fresh machine: `make demo` trains, `make test` proves. Both build .venv first. `make test-all` also
# runs the tests that take long.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --durations=30

# Threads that wait in a loop take the core that the one they wait for needs, when machines are small or shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-all test-rest check s3 format clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --quiet --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python demo.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Fast tests first: a broken contract shows in a minute, not after the kills. Then whole runs with real kills, object
# storage and two processes, alone, for their timing's sake.
test: check
	$(PYTEST) -m "not slow" -n 2
	$(PYTEST) -m end_to_end

# Everything: `test`, then each further kill, fault and engine.
test-all: test test-rest

test-rest: $(STAMP)
	$(PYTEST) -m "slow and not end_to_end"

# A real S3 server for hand trials, until Ctrl-C; prints the environment to export. The store is thrown away.
s3: $(STAMP)
	$(BIN)/python -m tests.s3_server

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out
