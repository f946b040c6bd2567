# Train, test, lint and build the site on a machine that has Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# All tests of a file run in one worker, so that they share compiled functions.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: train test test-all lint docs extras clean

train: $(VENV)/installed
	$(BIN)/imaml train $(ARGS)

# The fast tier, for every edit.
test: $(VENV)/installed-testing
	$(PYTEST) $(ARGS)

# Every test. Some need the type checkers, the build backend, Flax, Equinox, Lineax or Optimistix, which the extra dev
# installs.
test-all: $(VENV)/installed-dev
	$(PYTEST) --all $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Every warning is an error, and every link inside the site is checked. The examples run and draw their pictures.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

# Install each extra alone into a new environment, test it there, and remove the environment.
extras:
	$(PYTHON) benchmarks/extras.py $(ARGS)

# A stamp file records a finished installation. make installs again when pyproject.toml is newer than the stamp.
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
