# `make demo` and `make test` are all the set-up there is: both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint format clean
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/phx run recipes/demo.yaml --overwrite

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build runs src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
