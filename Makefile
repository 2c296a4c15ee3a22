# `make demo` shows what flcompress does; `make test` checks everything a reviewer would. Both set up .venv themselves.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
SHELL := bash
.SHELLFLAGS := -o pipefail -c
BIN := .venv/bin
RUN := runs/moving-digits
INSTALL = @echo "installing the tested set of packages into .venv; this takes some minutes"; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# A line a package, instead of pip's several.
SHOWN = | awk '/^(Collecting|Building|Installing|Successfully)/ { print "  " substr($$0, 1, 100); fflush() }'

.PHONY: demo test lint clean

demo: .venv/.demo
	$(BIN)/flcompress apply recipes/moving-digits.yaml
	$(BIN)/flcompress eval $(RUN)
	$(BIN)/flcompress bench $(RUN)
	$(BIN)/flcompress report $(RUN)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flcompress tests
	$(BIN)/lint-imports

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or run make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[onnxruntime,tensorrt-rtx]' $(SHOWN)
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev,onnxruntime,tensorrt-rtx]' $(SHOWN)
	@touch $@

clean:
	rm -rf .venv runs
