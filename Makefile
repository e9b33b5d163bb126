# make demo: install and run the main job.  make test: install and run the tests.
# make test-long: those that start, kill and wait for many processes (ten minutes).
# make gpu: run the tests that need a GPU with one that is pretended (ten minutes).
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

RUN_TESTS := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long gpu lint format clean

demo: .venv/run
	$(BIN)/tuner run studies/digits.toml

test: .venv/test
	$(RUN_TESTS) -m "not long"

test-long: .venv/test
	$(RUN_TESTS) -m long

gpu: .venv/test
	PYTHONPATH=tests $(BIN)/python -m pretended -m "gpu and not real" -n 2 tests

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tuner needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv || { echo "on Debian: apt-get install python3-venv"; exit 1; }

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

.venv/test: .venv/run
	$(INSTALL) --editable '.[test,lint,timm]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
