# Thin targets: what they run is what you would type. Everything lives in .venv; `make PYTHON=python3.12 ...` picks another.
PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 1
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/.demo  ## distil a real sentence encoder to half its depth, with a table, plots and a checkpoint
	$(BIN)/bertkd demo --seeds $(SEEDS) --output_dir runs/demo

test: $(VENV)/.dev  ## everything that can be proved on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.dev  ## chunked against eager on this machine's CPU
	$(BIN)/python benchmarks/relation_kl.py
	$(BIN)/python benchmarks/training_step.py

gpu:  ## on a GPU machine that already has torch and transformers; needs no network
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/test_*gpu.py $(ARGS)

# torch first and pinned, so that no other package's range decides which build is fetched.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
