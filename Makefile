# Every target makes or updates .venv as it needs; nothing has to be run before it.
#
#   make run ARGS="--trials 20 --out runs/mine"      make test ARGS="tests/physics -x"
#   make PYTHON=python3.12 setup                     choose the interpreter of a new .venv

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first interpreter that exists; tools/ensure_venv.py judges it and looks further itself.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p && break; done)
VENV := .venv/bin
ARGS ?=
# Processes that share the tests; 0: all in one, for a debugger.
WORKERS ?= 2
PYTEST := $(VENV)/python -m pytest -n $(WORKERS) --dist loadfile

# Packages of another Python must not shadow those of .venv.
unexport PYTHONHOME PYTHONPATH

.PHONY: help setup dev documenting run test test-slow lint format docs bench clean

help:  ## show this list
	@echo "usage: make TARGET [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

ifeq ($(strip $(PYTHON)),)
setup dev documenting:
	@echo "[setup] no python3 on PATH: install Python 3.11, 3.12 or 3.13" \
		"(Debian and Ubuntu: apt install python3 python3-venv)" >&2; exit 1
else
setup:  ## make .venv with what running needs
	@"$(PYTHON)" tools/ensure_venv.py

dev:  ## make .venv with what developing needs
	@"$(PYTHON)" tools/ensure_venv.py --extra dev

documenting:
	@"$(PYTHON)" tools/ensure_venv.py --extra docs
endif

# A study that goes on, or another one, is named in ARGS.
NAMED := $(filter --resume --resume=% --config --config=%,$(ARGS))

run: setup  ## tune a small network on simulated scenes, in minutes, on any machine
	@$(VENV)/python -m tuner.run $(if $(NAMED),,--config configs/quickstart.yaml) $(ARGS)

test: dev  ## run the tests
	@$(PYTEST) $(ARGS)

test-slow: dev  ## run the tests that take minutes
	@$(PYTEST) -m slow $(ARGS)

lint: dev  ## check style and types
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

format: dev  ## rewrite the code in the project's style
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

docs: documenting  ## build the documentation site in site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/python -m mkdocs --quiet build --strict $(ARGS)
	@echo "site/index.html"

bench: setup  ## measure the speed of everything and renew docs/performance.md
	@$(VENV)/python -m benchmarks.suite --write $(ARGS)

clean:  ## remove .venv and the caches (results in runs/ stay)
	rm -rf .venv .venv.lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
