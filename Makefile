# Thin targets: what they run is what you would type. Everything lives in .venv; `make PYTHON=python3.12 ...` picks another
# after `make clean`: a .venv that is there keeps its Python.
PYTHON ?= python3
VENV ?= .venv
# Targets and rules would take the parts of such a path for several, and `clean` would delete each.
ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV): must be one path without spaces)
endif
SEEDS ?= 1
BIN := $(VENV)/bin
# Narrow a benchmark, give it minutes, name the commit to compare with: make bench SELECT="relation_kl,L=512"
SELECT ?=
MINUTES ?= 7
BASE ?= HEAD
SELECTED = $(if $(SELECT),--select "$(SELECT)")

.PHONY: demo test lint bench bench-compare kernels-report gpu gpu-build gpu-test gpu-bench clean

demo: $(VENV)/.demo  ## distil a real sentence encoder to half its depth, with a table, plots and a checkpoint
	$(BIN)/bertkd demo --seeds $(SEEDS) --output_dir runs/demo

test: $(VENV)/.dev  ## everything that can be proved on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.dev  ## bertkd against PyTorch and other packages, on this machine
	$(BIN)/python -m bertkd.bench $(SELECTED)

bench-compare: $(VENV)/.dev  ## this tree against the commit BASE, case by case; fails where it is slower
	$(BIN)/python -m bertkd.bench compare --base $(BASE) $(SELECTED)

kernels-report: $(VENV)/.dev  ## registers, spills, shared memory and instructions of every Triton kernel; needs no GPU
	$(BIN)/python benchmarks/kernels_report --jobs 2

# On a GPU machine that already has torch, triton, transformers and pytest; needs no network. LIMIT minutes in all: the
# build gets half of them at most, the tests half of the rest, the benchmark what is left. What fails does not cost what
# comes after it: a case is verified before it is timed. Tests that run out of time are interrupted, as by Ctrl-C: pytest
# then says which have failed so far, which a termination would keep to itself.
LIMIT ?= 10
gpu:
	started=$$(date +%s); failed=0; \
	timeout $$(( $(LIMIT) * 30 )) $(MAKE) gpu-build || failed=1; \
	timeout -s INT -k 20 $$(( ($(LIMIT) * 60 - $$(date +%s) + $$started) / 2 )) $(MAKE) gpu-test || failed=1; \
	left=$$(( $(LIMIT) * 60 - 45 - ($$(date +%s) - $$started) )); \
	$(MAKE) gpu-bench MINUTES=$$($(PYTHON) -c "print(max($$left, 30) / 60)") && exit $$failed

gpu-build:  ## csrc for the GPU of this machine alone
	BERTKD_CUDA_ARCHS=native $(PYTHON) setup.py build_ext --inplace

# Most of the time goes into compiling kernels, so several workers help where pytest-xdist is there.
WORKERS = $(shell $(PYTHON) -c "import os, xdist; print('-n', min(14, os.cpu_count()))" 2>/dev/null)

# A file that cannot be imported, for want of a package, does not keep the others from running.
gpu-test:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu --continue-on-collection-errors tests/test_*gpu.py tests/test_triton_scale.py \
		$(WORKERS) $(ARGS)

gpu-bench:
	PYTHONPATH=. $(PYTHON) -m bertkd.bench --device cuda --budget_minutes $(MINUTES) $(SELECTED)

# torch first and pinned, so that no other package's range decides which build is fetched.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	touch $@

# The CUDA part has compile tests of its own; for six architectures it would double the installation's time.
INSTALL := BERTKD_BUILD=$${BERTKD_BUILD:-cpu} $(BIN)/pip install --quiet -c constraints.txt

SOURCES := pyproject.toml setup.py $(wildcard build_support/*.py csrc/*.* csrc/cpu/* csrc/cuda/*)

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info bertkd/_C.*.so bertkd/_build_info.json
