# Two commands on a fresh machine: `make demo` trains, `make test` proves. Both build .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait in a loop take the core that the one they wait for needs, when machines are small or shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check s3 format clean

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

# Fast tests first: a broken contract shows in a minute, not after the kills. Those run alone, for their timing's sake.
test: check
	$(BIN)/python -m pytest -m "not slow" -n 2
	$(BIN)/python -m pytest -m slow

# A real S3 server for hand trials, until Ctrl-C; prints the environment to export. The store is thrown away.
s3: $(STAMP)
	$(BIN)/python -m tests.s3_server

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out
