# Every target sets itself up. PYTHON makes the environment, VENV is where it lies, RUN is a run folder of your choice.
PYTHON ?= python3
VENV ?= .venv
RUN ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRAIN := $(BIN)/python examples/train_language_model.py --compare $(if $(RUN),--run "$(RUN)")

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint smoke benchmark clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED)  ## make the virtual environment and install into it, once

# One pip command: installed later, the constraints would come after another build of torch.
$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

demo: venv  ## train a language model with head graphs beside a plain one (3 minutes on two cores)
	$(TRAIN)

test: venv  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: venv  ## check the style
	$(BIN)/python -m ruff check .

smoke: venv  ## the demo with a few steps, to see that it runs
	$(TRAIN) --smoke

benchmark: venv  ## time and memory of head graphs against plain attention
	$(BIN)/python tools/benchmark.py

clean:  ## remove the virtual environment, build files and caches; run folders stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find gohgraph tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +
