# bpfx: `make demo` trains three ways on bundled data, `make test` runs every check. Both create .venv when it is missing.
#   make test PYTHON=python3.12      choose the interpreter (3.11 or 3.12)
#   make test ARGS="-k shim -x"      hand options to pytest (with `make demo`: to bpfx train)
#   make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"    choose the build of torch

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
JOBS   ?= 2
TORCH_ARGS ?=
ARGS   ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.bpfx-installed
TYPES  := build/types

.PHONY: demo test install lint types format pytest docs clean
.DEFAULT_GOAL := install

install: $(STAMP)

# torch goes first, alone and pinned, so that no other requirement can pull a different build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "bpfx needs Python 3.11 or 3.12; none found. Choose one with: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	touch $@

# Threads that wait without spinning: ten times faster when something else keeps one of two cores busy. And no log lines
# of the profiler in between the report.
demo: install
	OMP_WAIT_POLICY=passive TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/bpfx train $(ARGS)

test: lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# passes/ and models/ are bpfx.passes and bpfx.models only by pyproject's package-dir, which mypy does not read:
# show it the package as it is installed, through symbolic links.
types: install
	rm -rf $(TYPES)
	mkdir -p $(TYPES)/bpfx
	ln -s $(CURDIR)/bpfx/* $(CURDIR)/passes $(CURDIR)/models $(TYPES)/bpfx/
	cd $(TYPES) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p bpfx

# One thread per worker: two workers with two OpenMP threads each would fight over two cores.
pytest: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

docs: install
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bpfx passes models tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
