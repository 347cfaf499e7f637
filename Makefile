# Everything runs from .venv, which the first target that needs it creates.
PYTHON ?= python3
# Test processes. Each is pinned to one thread, so this is also the number of busy cores.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -lt 4 ] && echo "$$n" || echo 4)

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --benchmark-disable
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.hpp')

.DEFAULT_GOAL := help
.PHONY: help venv demo test check-full lint format wheel clean

help:
	@echo "make venv        create $(VENV) and install the project into it (PYTHON=$(PYTHON))"
	@echo "make demo        run the demonstration"
	@echo "make test        run the tests (JOBS=$(JOBS))"
	@echo "make check-full  run the slow tests; started again, it goes on where it stopped"
	@echo "make lint        ruff, clang-format, mypy and the import contracts"
	@echo "make format      rewrite the sources in the project's format"
	@echo "make wheel       build dist/*.whl"
	@echo "make clean       remove build products and caches ($(VENV) stays)"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is %d.%d; name another with PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/ptq4arvg demo

test: $(STAMP)
	$(PYTEST)

# Tests that passed before are skipped while the tree is the same (tests/resume.py).
check-full: $(STAMP)
	$(PYTEST) -p tests.resume --resume out/check-full.jsonl -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC),@echo "clang-format: no sources under csrc/ yet")
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

# build/ goes first: setuptools would carry files that were since deleted into the wheel.
wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
