# make quickstart   a fresh machine with Python 3.11+: installs into .venv, trains, prints text and the MLflow page
# make test         installs what the tests need, runs them: ten minutes at most on two cores
# make quick        only those of pure Python: under a minute
# make slow         only what `make test` leaves out: Ray clusters, Neuron's twins, long schedules of faults
# make check        format, lint, types, every test once: all that CI runs
# make picture      README's pictures of the MLflow page, anew; needs Chromium
# make bench        the benchmarks, an hour or so: the tables of tests/benchmarks/RESULTS.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Several hundred processes of the tests import the package: it is compiled once.
TESTS := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

.PHONY: quickstart quick test slow check format lint types bench picture clean

quickstart: $(VENV)/.installed
	$(BIN)/raynium train quickstart

quick: $(VENV)/.installed-dev
	$(TESTS) -m quick

test: $(VENV)/.installed-dev
	$(TESTS) -m 'not slow'

slow: $(VENV)/.installed-dev
	$(TESTS) -m slow

check: format lint types
	$(TESTS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check platform jobs tests install.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check platform jobs tests install.py

types: $(VENV)/.installed-dev
	$(BIN)/basedpyright --warnings

bench: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/run.py

picture: $(VENV)/.installed-dev
	$(BIN)/python tests/mlflow_picture.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Raynium needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=<a newer one>")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt install.py | $(VENV)/bin/python
	@$(BIN)/python install.py
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt constraints-dev.txt install.py | $(VENV)/bin/python
	@$(BIN)/python install.py --dev
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist
