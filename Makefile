# Every target sets up what it needs: a virtual environment in .venv and the package in it, editable.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/installed

.PHONY: demo test test-all lint types check clean

demo: $(INSTALLED)  ## train, score and draw on a synthetic set: under 10 minutes on 2 cores
	$(VENV)/bin/perpixel demo --out demo

test: $(INSTALLED)  ## the tests, with coverage of the package
	$(RUN) pytest -m "not slow" --cov=perpixel --cov-report=term --cov-fail-under=90

test-all: $(INSTALLED)  ## the longer tests, too
	$(RUN) pytest

lint: $(INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(INSTALLED)
	$(RUN) mypy

check: lint types test

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check --editable ".[lite,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .coverage
