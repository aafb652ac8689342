# Each target sets up what it lacks: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first used, and once: of all that is installed, most never are.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile --editable

.PHONY: demo quick test test-all test-hardening docs bench evidence kernels lock check fix clean

demo: .venv/demo
	$(BIN)/lewis-hub demo

quick: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m fast --numprocesses auto

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto --dist worksteal

test-all: .venv/dev test .venv/ray .venv/space .venv/mergekit/bin/mergekit-yaml
	LEWIS_HUB_MERGEKIT=$(CURDIR)/.venv/mergekit/bin/mergekit-yaml $(BIN)/pytest -m slow --numprocesses auto

# The long form of tests/hardening: hours. LEWIS_HUB_SEED draws other cases.
test-hardening: export LEWIS_HUB_LONG ?= 100
test-hardening: .venv/dev
	$(BIN)/pytest tests/hardening -m '' --numprocesses auto

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'Built site/. To read it: $(BIN)/python -m http.server --directory site'

bench: .venv/dev .venv/mergekit/bin/mergekit-yaml
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/merge.py --mergekit .venv/mergekit/bin/mergekit-yaml
	$(BIN)/python benchmarks/calibration.py $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/architectures.py --mergekit .venv/mergekit/bin/python

# Days: every row of the tables on guidance, of the zoo in hours, and of MODELS and DATA where they are
# given, with a third expert. `evidence/` keeps the scores: a run goes on where another ended.
GUIDANCE = $(BIN)/python benchmarks/guidance.py evidence
REFINEMENTS = $(BIN)/python benchmarks/refinements.py
ROUNDED = --items 250 --variants 'experts alone' 'task_arithmetic 0.7' 'ties 0.5 lambda 1.0' \
    'regmean 0.5 lambda 1.0'
evidence: .venv/dev
	$(GUIDANCE) --dtype float32 --all
	$(REFINEMENTS) lewis_hub/demo/zoo evidence/items evidence '*' --skills reverse cipher --dtype float32
	$(REFINEMENTS) lewis_hub/demo/zoo evidence/items evidence 'cross 0.[79] faithful 1.0*' 'merged 0.9' \
	    'own 0.5' --skills reverse cipher --dtype float32 --split test
ifdef MODELS
	mkdir -p evidence/data
	cp -r $(DATA)/skills $(DATA)/gsm8k $(DATA)/mbpp evidence/data
	$(BIN)/python benchmarks/third_expert.py $(MODELS) evidence/data/skills
	$(GUIDANCE) $(LAB) --skills math strings --all
	$(GUIDANCE) $(LAB) --skills math strings $(ROUNDED)
	$(GUIDANCE) $(LAB) --skills math strings --dtype float32 $(ROUNDED)
	$(GUIDANCE) $(LAB) --split tune --variants 'task_arithmetic *' 'ties * lambda *' linear
	$(GUIDANCE) $(LAB) --best task_arithmetic ties linear --variants 'experts alone' \
	    'regmean merged 0.[79]' 'regmean 0.5 lambda 1.0'
	$(REFINEMENTS) $(MODELS) evidence/data/skills evidence 'cross 0.5 faithful 1.0' 'own 0.5' --split test
	$(REFINEMENTS) $(MODELS) evidence/data/skills evidence 'cross 0.7 faithful 1.0' \
	    'cross 0.[37] faithful 1.0 corrected*' --skills math strings roman
	$(BIN)/python benchmarks/aim.py $(MODELS) evidence/data/skills evidence 'task_arithmetic 0.8' \
	    'ties 0.5 lambda 1.0' --split tune
endif
LAB = --models $(MODELS) --data evidence/data/skills

# After a change to a loop: what LLVM compiles on a user's machine, without numba.
kernels: .venv/dev
	$(BIN)/python -c 'from lewis_hub.kernels.machine_code import write_archive; write_archive()'

# What workflows install beside a token, and what builds a release, each file by its hash.
COMPILE = .venv/lock/bin/uv pip compile --universal --generate-hashes --no-header --no-annotate \
    --index-url https://pypi.org/simple --quiet
lock: .venv/lock/bin/uv
	curl --fail --silent --show-error -o .venv/lock/torch.html https://download.pytorch.org/whl/cpu/torch/
	$(COMPILE) --python-version 3.11 pyproject.toml -o .venv/lock/resolved.txt
	$(PYTHON) .ci/lock.py .venv/lock/torch.html < .venv/lock/resolved.txt > templates/workflows/requirements.txt
	$(COMPILE) --python-version 3.13 .ci/build.in -o .ci/build.txt

check: test

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/mergekit/bin/mergekit-yaml: | .venv/bin/python
	$(PYTHON) -m venv .venv/mergekit
	.venv/mergekit/bin/pip install --quiet mergekit==0.1.5

.venv/lock/bin/uv: | .venv/bin/python
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/pip install --quiet uv

.venv/demo .venv/dev .venv/docs: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[$(@F)]'
	touch $@

.venv/ray .venv/space: pyproject.toml | .venv/dev
	$(INSTALL) '.[$(@F)]'
	touch $@
