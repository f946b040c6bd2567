# The main job and the whole test suite, on a machine that has Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint docs clean

train: $(VENV)/installed
	$(BIN)/imaml train $(ARGS)

test: $(VENV)/installed-testing
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Every warning is an error, and every link inside of the site is checked. The examples run, for their pictures.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

# Each stamp stands for an installation that went through; it is made anew when the requirements change.
$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV), which takes a minute …"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-testing: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[testing]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-testing
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build docs/generated
