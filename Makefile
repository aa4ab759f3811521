# Every target sets itself up. PYTHON makes the environment, VENV is where it lies, RUN is a run folder of your choice.
PYTHON ?= python3
VENV ?= .venv
RUN ?=

BIN := $(VENV)/bin
# The mark of each extra of setup.cfg that is installed. What the tests need is enough for the demo.
ALL := $(VENV)/.installed-test
DEMO := $(or $(wildcard $(ALL)),$(VENV)/.installed-train)
TRAIN := $(BIN)/gohgraph demo $(if $(RUN),--run "$(RUN)")

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs notebooks smoke benchmark dist clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(ALL)  ## make the virtual environment and install into it what any target needs, once

# The constraints name one build of torch, so that what is installed later leaves it as it is.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(DEMO)  ## train a language model with head graphs beside a plain one (3 minutes on two cores)
	$(TRAIN)

# Three workers on two cores: some tests wait for processes that they start. Without bytecode on disk, which some
# environments forbid, each of these would compile the package anew.
test: $(ALL)  ## run the tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile

lint: $(ALL)  ## check the style and the types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs  ## build the site into site/, strictly; it is read from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "built: open site/index.html"

notebooks: $(ALL) $(VENV)/.installed-docs  ## run the notebooks of the site and keep what they print and draw
	PYTHONWARNINGS=ignore TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False docs/notebooks/*.ipynb

smoke: $(DEMO)  ## the demo with a few steps, to see that it runs
	$(TRAIN) --smoke

benchmark: $(ALL)  ## time and memory of head graphs against plain attention
	$(BIN)/python tools/benchmark.py

dist: $(VENV)/.installed-dev  ## build the packages and check what an index would show of them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove the virtual environment, build files and caches; run folders stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find gohgraph tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +
