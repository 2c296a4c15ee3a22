# `make demo` shows what flcompress does; `make check` is for every commit, `make test` checks everything a reviewer would;
# `make docs` builds the site. All of them set up .venv themselves.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
SHELL := bash
.SHELLFLAGS := -o pipefail -c
BIN := .venv/bin
RUN := runs/moving-digits
LOWEST := .venv-lowest
TORCH_TENSORRT := .venv-torch-tensorrt
comma := ,
# The tests start hundreds of processes, which would each compile the package.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# $(call install,ENVIRONMENT,CONSTRAINTS,EXTRAS): a line a package, instead of pip's several.
install = @echo "installing packages into $(1); this takes some minutes"; \
	$(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off -c $(2) -e '.[$(3)]' \
	| awk '/^(Collecting|Building|Installing|Successfully)/ { print "  " substr($$0, 1, 100); fflush() }'

.PHONY: demo check test test-gpu test-lowest test-torch-tensorrt lint docs clean

demo: .venv/.demo
	$(BIN)/flcompress apply recipes/moving-digits.yaml
	$(BIN)/flcompress eval $(RUN)
	$(BIN)/flcompress bench $(RUN)
	$(BIN)/flcompress report $(RUN)

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow and not e2e"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# On a machine with a GPU, whose torch is built with CUDA: parity with the CPU, memory against the plan, every family the whole
# way, engines. Elsewhere they skip. Files run next to each other, those of real size in one process.
test-gpu: .venv/.test
	$(BIN)/python -m pytest -n 4 --dist loadfile -m gpu

# The same tests with the lowest versions that pyproject.toml allows.
test-lowest: $(LOWEST)/.test
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(PYTEST)

# Engines of Torch-TensorRT, built without a GPU; in an environment of its own (7 GB), for it takes another torch. Its warnings
# are its own.
test-torch-tensorrt: $(TORCH_TENSORRT)/.test
	OMP_NUM_THREADS=1 $(TORCH_TENSORRT)/bin/python -m pytest -W default tests/torch_tensorrt

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flcompress tests
	$(BIN)/lint-imports

# Strict: a broken link or a documented name that does not exist ends the build.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/bin/python $(LOWEST)/bin/python $(TORCH_TENSORRT)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one or run make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(@:/bin/python=)

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,onnxruntime$(comma)tensorrt-rtx)
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,dev$(comma)onnxruntime$(comma)tensorrt-rtx)
	@touch $@

.venv/.docs: .venv/bin/python pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,docs)
	@touch $@

$(LOWEST)/.test: $(LOWEST)/bin/python pyproject.toml constraints-lowest.txt
	$(call install,$(LOWEST),constraints-lowest.txt,dev$(comma)onnxruntime$(comma)tensorrt-rtx)
	@touch $@

$(TORCH_TENSORRT)/.test: $(TORCH_TENSORRT)/bin/python pyproject.toml constraints-torch-tensorrt.txt
	$(call install,$(TORCH_TENSORRT),constraints-torch-tensorrt.txt,dev$(comma)torch-tensorrt-rtx)
	@touch $@

clean:
	rm -rf .venv $(LOWEST) $(TORCH_TENSORRT) runs site
