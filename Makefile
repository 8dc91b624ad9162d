PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup dev demo test lint clean

# the environment, with the command `patchmill` in it; the stamps make every target safe to repeat
setup: $(VENV)/setup.stamp

dev: $(VENV)/dev.stamp

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'patchmill needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/setup.stamp: $(VENV)/python.stamp pyproject.toml setup.py constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/setup.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/demo.stamp: $(VENV)/setup.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

# the main job on one small real slide: embed, index, query with a picture, probe
demo: $(VENV)/demo.stamp
	$(BIN)/patchmill demo .demo

test: dev lint
	$(BIN)/python -m pytest

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sh tests/lint.sh $(BIN) build/lint

clean:
	rm -rf $(VENV) build .demo
