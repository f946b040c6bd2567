# The main job and the whole test suite, on a machine that has Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint clean

train: $(VENV)/installed
	$(BIN)/imaml train $(ARGS)

test: $(VENV)/installed-testing
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

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

clean:
	rm -rf $(VENV)
