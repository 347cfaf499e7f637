# Everything runs from .venv, which the first target that needs it creates.
PYTHON ?= python3
# Test processes. Each is pinned to one thread, so this is also the number of busy cores.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -lt 4 ] && echo "$$n" || echo 4)

VENV := .venv
STAMP := $(VENV)/.installed
BUILT := $(VENV)/.built
BIN := $(VENV)/bin
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.hpp')

# CUDA kernels of the module in the package: for this machine's GPUs, or, where tests emulate them, for one architecture
# (every one takes its time). Wheels have all.
CUDA_ARCHS ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '.' | sort -u | paste -sd ';' | grep . || echo 80)

# Builds of the compiled module for tests, apart from the one in the package.
EMULATED := build/emulated
SANITIZED := build/sanitized
BUILD_FILES := setup.py $(wildcard build_support/*.py)
MODULE = PTQ4ARVG_CPU_MODULE=$$(ls $(1)/ptq4arvg_kernels/_cpu.*.so)
BUILD_INTO = PTQ4ARVG_BUILD_CUDA=0 $(BIN)/python setup.py --quiet build_ext --build-lib $(1) --build-temp $(1)/objects
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g -DPTQ_DEBUG
# LD_PRELOAD: Python itself knows nothing of the sanitizers, and their runtime must be there first.
RUNTIMES = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"
# Reports go to files: pytest holds back what a process that is stopped wrote. Python keeps memory until its end, so
# leaks are not looked for.
REPORT := $(abspath $(SANITIZED))/report
REPORTS := ASAN_OPTIONS=detect_leaks=0:log_path=$(REPORT) \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$(REPORT)

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-emulated sanitize bench-kernels check-full lint format wheel clean

help:
	@echo "make venv           create $(VENV), install the project into it and compile (PYTHON=$(PYTHON))"
	@echo "make build          compile csrc/ again if it changed (CUDA_ARCHS=$(CUDA_ARCHS), where there is an nvcc)"
	@echo "make demo           run the demonstration"
	@echo "make test           run the tests (JOBS=$(JOBS))"
	@echo "make test-emulated  run the kernel tests with AVX-512 and AMX emulated: without them, their only test"
	@echo "make sanitize       run a part of the kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make check-full     run the slow tests; started again, it goes on where it stopped"
	@echo "make bench-kernels  time single CPU kernels"
	@echo "make lint           ruff, clang-format, mypy and the import contracts"
	@echo "make format         rewrite the sources in the project's format"
	@echo "make wheel          build dist/*.whl"
	@echo "make clean          remove build products and caches ($(VENV) stays)"

venv: $(BUILT)
build: $(BUILT)

# Compiled by $(BUILT), once.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is %d.%d; name another with PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	PTQ4ARVG_NATIVE=0 $(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

# The stamp is as old as the beginning of a build: sources saved meanwhile are compiled next time.
$(BUILT): $(CSRC) $(BUILD_FILES) | $(STAMP)
	@touch $@.new
	PTQ4ARVG_CUDA_ARCHS='$(CUDA_ARCHS)' $(BIN)/python setup.py --quiet build_ext --inplace
	@mv $@.new $@

demo: $(BUILT)
	$(BIN)/ptq4arvg demo

test: $(BUILT)
	$(PYTEST) --benchmark-disable

$(EMULATED)/.built: $(CSRC) $(BUILD_FILES) | $(STAMP)
	@rm -rf $(EMULATED) && mkdir -p $(EMULATED) && touch $@.new
	PTQ4ARVG_EMULATE=1 $(call BUILD_INTO,$(EMULATED))
	@mv $@.new $@

test-emulated: $(BUILT) $(EMULATED)/.built
	$(call MODULE,$(EMULATED)) $(PYTEST) --benchmark-disable tests/kernels -k "avx512vnni or amx"

# With AVX-512 and AMX emulated: the sanitizers see its loads, also those in assembly, and need no machine that has it.
$(SANITIZED)/.built: $(CSRC) $(BUILD_FILES) | $(STAMP)
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && touch $@.new
	PTQ4ARVG_EMULATE=1 CXXFLAGS="$(SANITIZERS)" $(call BUILD_INTO,$(SANITIZED))
	@mv $@.new $@

sanitize: $(BUILT) $(SANITIZED)/.built
	@rm -f $(REPORT).*
	$(call MODULE,$(SANITIZED)) $(REPORTS) $(RUNTIMES) $(PYTEST) --benchmark-disable --exitfirst tests/kernels \
	    -m sanitize || { cat $(REPORT).* 2>/dev/null; exit 1; }
	@for report in $(REPORT).*; do [ ! -e "$$report" ] || { cat "$$report"; exit 1; }; done

bench-kernels: $(BUILT)
	$(ONE_THREAD) $(BIN)/python -m pytest --benchmark-only benchmarks/test_kernels_cpu.py

# Tests that passed before are skipped while the tree is the same (tests/resume.py).
check-full: $(BUILT)
	$(PYTEST) --benchmark-disable -p tests.resume --resume out/check-full.jsonl -m slow

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

# What setuptools keeps under build/ goes first: it would carry files that were since deleted into the wheel.
wheel: $(STAMP)
	rm -rf build/lib* build/temp* build/bdist* dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	rm -f ptq4arvg_kernels/_cpu.*.so ptq4arvg_kernels/_cuda.*.so $(BUILT)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
