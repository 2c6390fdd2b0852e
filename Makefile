# lorapack: what a newcomer and CI type. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := runs/rank-smollm2-tasks
# The pin of torch names no build. PyPI's build for Linux brings CUDA; a CPU build that is already in .venv satisfies the pin and stays.
SIZE := about 2 GB; where torch brings CUDA some 3 GB more: README says how to avoid that

.DEFAULT_GOAL := help
.PHONY: help install run test test-all test-fast lint format clean browser

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(VENV)/.installed ## create .venv with the pinned versions

run: install ## train the default sweep (four LoRA ranks) here, end to end, and report
	$(BIN)/python -m launcher sweep=rank

test: $(VENV)/.tested browser ## run all tests, over a few architectures of each kind
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadgroup -m "not exhaustive"

test-all: $(VENV)/.tested browser ## run them over each of more than a hundred architectures too (about an hour on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadgroup

test-fast: $(VENV)/.tested ## run the quick tests: no Slurm, no browser, nothing marked slow (under 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup -m "not slow and not slurm and not browser"

browser: # Chromium, for the tests of report.html; installed where that takes no more than a line
	@for name in chromium chromium-browser google-chrome-stable google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium, for the tests of report.html"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null || \
			echo "chromium could not be installed, so report.html is tried in no browser" >&2; \
	else \
		echo "no Chromium, so report.html is tried in no browser: install one (apt-get install chromium, dnf, brew)" >&2; \
	fi

lint: $(VENV)/.tested ## check style, types and imports between rooms (ruff, mypy --strict, import-linter)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: $(VENV)/.tested ## bring the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets made: .venv, caches, the default sweep (other sweeps stay)
	rm -rf $(VENV) cache $(DEMO) *.egg-info build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@rmdir runs 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorapack needs Python 3.11 or later, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv: apt-get install python3-venv, or make PYTHON=/path/to/another" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned packages into $(VENV) ($(SIZE))"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.tested: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned packages and the tools for tests into $(VENV) ($(SIZE))"
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
