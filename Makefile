# make help lists the targets.
VENV   := .venv
PYTHON := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
export JAX_PLATFORMS ?= cpu

.PHONY: help quickstart test test-slow lint clean setup setup-dev

help:            ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: setup  ## set up, train on the standard library's source (3 minutes), evaluate, sample
	$(PYTHON) -m longctx.main --config=configs/quickstart.py --workdir=$(WORKDIR)
	@echo
	@echo 'a sample after the prompt "def ":'
	@$(PYTHON) -m longctx.generate --workdir=$(WORKDIR) --prompt='def ' --max_new_tokens=300 \
	    --temperature=0.6 --seed=3

test: setup-dev  ## set up, then ruff, import-linter and pytest
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m 'not slow'

test-slow: setup-dev  ## the checks that take minutes
	$(PYTHON) -m pytest -q -m slow

lint: setup-dev  ## ruff and import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

clean:           ## remove the virtual environment, runs and caches of this folder
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/bin/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'longctx needs Python 3.11 or newer as python3'; exit 1; }
	python3 -m venv $(VENV)

$(VENV)/.ready: requirements.txt | $(VENV)/bin/python
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
