# `make demo` and `make test` need Python 3.10 or newer, a C++ compiler and make. Everything else goes into
# .venv, which a second run reuses; an edit to csrc/, CMakeLists.txt or pyproject.toml rebuilds what it must.
#
#   PYTHON=python3.12    the interpreter that .venv is made with
#   TORCH=torch==2.6.0   the torch to install
#   TORCH_INDEX=URL      where to get it: PyTorch's CPU index saves a download of several GB on Linux
#   ARGS="-k static"     handed on to pytest, `pycompress demo`, `pycompress compress`, the benchmarks or gpu-check
#   BENCH=distill_loss   the benchmarks to run, by default all
#   EXAMPLE=digits       which of examples/ `make example` runs
#   CUDA=ON              whether to build the CUDA module: AUTO, ON or OFF. By default AUTO, where nvcc is found; but
#                        .venv goes without it beside a torch for CPUs, which has no GPU tensors to hand to it
#   CUDA_TARGETS=90a     the GPUs it is for, as CMake's CMAKE_CUDA_ARCHITECTURES; by default all, see cmake/cuda.cmake
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
ARGS ?=
BENCH ?= int8_matmul int4_matmul distill_loss sparse_linear
EXAMPLE ?= digits
CUDA ?=
CUDA_TARGETS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# The build runs in .venv instead of an isolated environment, so that it is incremental.
BUILD_TOOLS := 'scikit-build-core>=0.10' 'pybind11>=2.12' 'cmake>=3.18' ninja
# Directories too: their time changes when a file is added or removed.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/* csrc csrc/* csrc/*/* csrc/common/cuda/* kernels)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu csrc/common/cuda/* \
    tests/cpp/*.h tests/cpp/*.cpp) $(shell find tests/cuda_emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
# A torch for CPUs never hands the CUDA module a tensor, so beside it the minutes that nvcc takes are for nothing.
CUDA_HERE = $(eval CUDA_HERE := $(or $(CUDA),$(shell $(PY) -c $(ASK_TORCH))))$(CUDA_HERE)
ASK_TORCH := 'import torch; print("AUTO" if torch.version.cuda else "OFF")'
TARGETS_OPTION = $(if $(CUDA_TARGETS),'--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_TARGETS)')

.PHONY: help demo example test cpp-test gpu-check gpu-tables bench lint format wheel clean distclean
.NOTPARALLEL:  # two pip runs in one environment would trip over each other; the compiler runs in parallel anyway
.DELETE_ON_ERROR:

help:
	@echo "make demo      a real sentence encoder, fp32 against int8, side by side"
	@echo "               ARGS=prune: the encoder pruned, and a classifier pruned while it trains"
	@echo "               ARGS=distill: a student taught by a teacher, and what the loss costs"
	@echo "make example   examples/digits compressed end to end; EXAMPLE=minilm_sparse, minilm_student: a sentence encoder"
	@echo "make test      the test suite"
	@echo "make cpp-test  the C++ tests, with address and undefined-behaviour sanitizers"
	@echo "make gpu-check on a machine with a GPU, with the torch that PYTHON has: tests, compute-sanitizer, benchmarks"
	@echo "make gpu-tables the tables of docs/gpu.md anew, which needs no GPU"
	@echo "make bench     every operation against torch and who else computes it; BENCH=distill_loss runs one"
	@echo "make lint      ruff, mypy, clang-format;  make format  rewrites"
	@echo "make wheel     a wheel in dist/"
	@echo "make clean     removes what was built;    make distclean  .venv too"

demo: $(VENV)/.demo
	$(VENV)/bin/pycompress demo $(ARGS)

example: $(VENV)/.demo
	$(VENV)/bin/pycompress compress examples/$(EXAMPLE)/recipe.yaml $(ARGS)

test: $(VENV)/.test
	$(PY) -m pytest $(ARGS)

bench: $(VENV)/.bench
	set -e; for name in $(BENCH); do $(VENV)/bin/pycompress bench $$name $(ARGS); done

cpp-test: $(VENV)/.tools
	$(VENV)/bin/cmake -S . -B build/cpp-test -G Ninja --log-level=WARNING \
	    -DCMAKE_MAKE_PROGRAM="$(abspath $(VENV))/bin/ninja" -DCMAKE_BUILD_TYPE=Release \
	    -DPYCOMPRESS_BUILD_PYTHON=OFF -DPYCOMPRESS_BUILD_TESTS=ON -DPYCOMPRESS_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build build/cpp-test
	$(VENV)/bin/ctest --test-dir build/cpp-test --output-on-failure $(ARGS)

gpu-tables: cpp-test $(VENV)/.test
	env -u TRITON_INTERPRET $(PY) -m tests.triton_compile --out build/triton.json
	$(PY) -m tests.gpu_tables

# Not in .venv, which has a torch of its own.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m mypy
	@echo clang-format; $(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

wheel: $(VENV)/.tools
	@$(PIP) wheel --no-deps --wheel-dir dist --config-settings=cmake.define.PYCOMPRESS_CUDA=$(or $(CUDA),AUTO) \
	    $(TARGETS_OPTION) .
	@ls -l dist/*.whl

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)

# ---- the environment: a stamp a step, touched when the step is done ----

$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.10 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> $(VENV): $(TORCH) and the build tools"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install 'pip>=23.1' $(BUILD_TOOLS)
	@$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# The package, editable, with the extra that the stamp is named after.
STAMPS := $(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.dev
$(STAMPS): $(VENV)/.%: $(VENV)/.tools $(SOURCES)
	@echo "==> $(VENV): building pycompress, with what $* needs (PYCOMPRESS_CUDA=$(CUDA_HERE))"
	@$(PIP) install --no-build-isolation --config-settings=build-dir=build/editable \
	    --config-settings=cmake.define.PYCOMPRESS_CUDA=$(CUDA_HERE) $(TARGETS_OPTION) --editable '.[$*]'
	@touch $@
