# make quickstart   a fresh machine with Python 3.11+: installs into .venv, trains, prints text and the MLflow page
# make test         installs what the tests need, runs them
# make check        format, lint, types, tests: all that CI runs
# make bench        the benchmarks; their last results are in tests/benchmarks/RESULTS.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test check format lint types bench clean

quickstart: $(VENV)/.installed
	$(BIN)/raynium train quickstart

test: $(VENV)/.installed-dev    # several hundred processes import the package: it is compiled once
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

check: format lint types test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check platform jobs tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check platform jobs tests

types: $(VENV)/.installed-dev
	$(BIN)/basedpyright --warnings

bench: $(VENV)/.installed-dev
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Raynium needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=<a newer one>")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (torch, ray and mlflow: about 1.5 GB, a minute or a few)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist
