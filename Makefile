# Each target sets up what it lacks: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first used, and once: of all that is installed, most never are.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile --editable

.PHONY: demo test test-all bench evidence check fix clean

demo: .venv/demo
	$(BIN)/lewis-hub demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto

test-all: .venv/dev test .venv/ray .venv/mergekit/bin/mergekit-yaml
	LEWIS_HUB_MERGEKIT=$(CURDIR)/.venv/mergekit/bin/mergekit-yaml $(BIN)/pytest -m slow --numprocesses auto

bench: .venv/dev .venv/mergekit/bin/mergekit-yaml
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/merge.py --mergekit .venv/mergekit/bin/mergekit-yaml
	$(BIN)/python benchmarks/calibration.py $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/architectures.py --mergekit .venv/mergekit/bin/python

# Hours: every row of the tables on guidance, of the zoo and of MODELS and DATA where they are given.
evidence: .venv/dev
	$(BIN)/python benchmarks/guidance.py evidence --dtype float32 --all
	$(if $(MODELS),$(BIN)/python benchmarks/guidance.py evidence --models $(MODELS) --data $(DATA) --all)

check: test

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/mergekit/bin/mergekit-yaml: | .venv/bin/python
	$(PYTHON) -m venv .venv/mergekit
	.venv/mergekit/bin/pip install --quiet mergekit==0.1.5

.venv/ray: pyproject.toml | .venv/dev
	$(INSTALL) '.[ray]'
	touch $@

.venv/demo: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[demo]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[dev]'
	touch $@
