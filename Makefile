# `make` lists the targets. Everything is installed into .venv; stamps in .venv/.stamps make a second run
# do nothing. PYTHON=python3.12 chooses the interpreter, BOP2ND_BACKEND=scalar forces a backend.

PYTHON ?= python3
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
CMAKE_BUILD := build/cmake

# Tools of the environment come first: cmake, ninja and clang-format are pinned there.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MAX_JOBS ?= $(JOBS)

NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.py')
CLANG_FORMAT_SOURCES = $(shell find csrc include runtime tests/cpp benchmarks -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \))

.DEFAULT_GOAL := help
.PHONY: help install demo test arm arm-test wheel docs pictures check cuda-check sanitize sanitize-threads sanitize-python format bench fuzz clean runtime fuzz-runtime
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

$(BIN)/python:
	@echo "==> making the virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned environment needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose another with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(STAMPS)/requirements: requirements/dev.txt | $(BIN)/python
	@echo "==> installing the pinned requirements (torch first time: a large download)"
	@$(BIN)/python -m pip install --quiet --requirement requirements/dev.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/project: $(STAMPS)/requirements $(NATIVE_SOURCES)
	@echo "==> building the native code and installing the project in place"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

install: $(STAMPS)/project  ## make .venv, install pinned dependencies, build and install the project

demo: install  ## train, pack, predict and benchmark on real data; pictures go to out/demo
	@echo "==> demo: digits to 95 %, packed, reloaded, benchmarked"
	@$(BIN)/python -m examples.demo --out out/demo

test: install  ## every Python and C++ test
	@sh cmake/arm-tools.sh || true
	@echo "==> Python tests"
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -x -q --durations=10 -m "not fuzz" --numprocesses=$(JOBS) --dist=worksteal
	@echo "==> C++ tests of the torch-free core"
	@mkdir -p build
	@cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release > $(CMAKE_BUILD).log 2>&1 || { cat $(CMAKE_BUILD).log; exit 1; }
	@cmake --build $(CMAKE_BUILD) --parallel $(JOBS) >> $(CMAKE_BUILD).log 2>&1 || { cat $(CMAKE_BUILD).log; exit 1; }
	@ctest --test-dir $(CMAKE_BUILD) --output-on-failure --no-tests=error
	@$(MAKE) --no-print-directory arm-test

ARM_BUILD := build/arm

arm: install  ## build/arm/bop2nd-run, the runtime's program for 64-bit ARM (needs g++-aarch64-linux-gnu)
	@echo "==> build/arm/bop2nd-run"
	@mkdir -p build
	@{ cmake -S . -B $(ARM_BUILD) -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake -DCMAKE_BUILD_TYPE=Release && \
	   cmake --build $(ARM_BUILD) --parallel $(JOBS) --target bop2nd-run; } > $(ARM_BUILD).log 2>&1 || { cat $(ARM_BUILD).log; exit 1; }

arm-test: install  ## the C++ tests as 64-bit ARM code, emulated (skipped where cross compiler or qemu-user are not to be had)
	@if sh cmake/arm-tools.sh; then \
	  echo "==> C++ tests on an emulated ARM" && mkdir -p build && \
	  { cmake -S . -B $(ARM_BUILD) -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake -DCMAKE_BUILD_TYPE=Release && \
	    cmake --build $(ARM_BUILD) --parallel $(JOBS); } > $(ARM_BUILD).log 2>&1 || { cat $(ARM_BUILD).log; exit 1; }; \
	  ctest --test-dir $(ARM_BUILD) --parallel $(JOBS) --output-on-failure --no-tests=error; \
	fi

# Repaired: the wheels' names say from which glibc on they run. torch's libraries are torch's to bring along.
wheel: install  ## wheels of bop2nd_fast and bop2nd_runtime, into dist
	@echo "==> wheels"
	@rm -rf build/wheels && mkdir -p build/wheels
	@cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release > $(CMAKE_BUILD).log 2>&1 || { cat $(CMAKE_BUILD).log; exit 1; }
	@cmake --build $(CMAKE_BUILD) --parallel $(JOBS) --target bop2nd_runtime_static >> $(CMAKE_BUILD).log 2>&1 || { cat $(CMAKE_BUILD).log; exit 1; }
	@$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheels .
	@$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheels \
	  -C cmake.define.BOP2ND_RUNTIME_LIBRARY=$(CURDIR)/$(CMAKE_BUILD)/libbop2nd_runtime.a ./runtime
	@$(BIN)/auditwheel --verbose repair --wheel-dir dist --exclude 'libtorch*.so' --exclude libc10.so build/wheels/*.whl \
	  > build/wheels/repair.log 2>&1 || { cat build/wheels/repair.log; exit 1; }
	@ls -1 dist/*.whl

RUNTIME_BUILD := build/runtime

runtime: out/demo/packed_outputs.npy  ## the library without torch, its C example on the digits of the demo
	@echo "==> the runtime: library, C example"
	@mkdir -p build
	@cmake -S . -B $(RUNTIME_BUILD) -DCMAKE_BUILD_TYPE=Release > $(RUNTIME_BUILD).log 2>&1 && \
	  cmake --build $(RUNTIME_BUILD) --parallel $(JOBS) --target bop2nd_runtime bop2nd_runtime_static predict >> $(RUNTIME_BUILD).log 2>&1 || { cat $(RUNTIME_BUILD).log; exit 1; }
	@echo "==> the digits, without torch"
	@$(RUNTIME_BUILD)/predict out/demo/model.safetensors out/demo/test_images.npy > out/demo/classes.txt
	@$(BIN)/python -c "import numpy as n; a = n.load('out/demo/packed_outputs.npy').argmax(1); c = n.loadtxt('out/demo/classes.txt'); \
	  assert n.array_equal(a, c), 'other classes than torch'; print(f'{len(c)} digits: the classes that torch predicts')"

out/demo/packed_outputs.npy: | install
	@$(BIN)/python -m examples.demo --no-benchmark --out out/demo

fuzz-runtime: install  ## a million mutated packed files through loader and run, with sanitizers (hours)
	@cmake -S . -B build/sanitize -G Ninja -DBOP2ND_SANITIZE=ON > /dev/null
	@cmake --build build/sanitize --parallel $(JOBS) --target fuzz_runtime > /dev/null
	@build/sanitize/fuzz_runtime 1000000

docs: install  ## build the documentation into build/docs; warnings are errors
	@echo "==> documentation"
	@$(BIN)/sphinx-build -q -E -W --keep-going -b html docs build/docs
	@echo "    build/docs/index.html"

pictures: install  ## draw the pictures of docs/optimizer.md again (trains for some minutes)
	$(BIN)/python docs/draw.py

check: install  ## formatting, lint and types; changes nothing
	@echo "==> ruff, mypy, clang-format"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run make format"; $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(if $(CLANG_FORMAT_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMAT_SOURCES),true)

cuda-check: install  ## compile the CUDA kernels for every architecture and judge their machine code (needs nvcc)
	@echo "==> CUDA kernels: registers, spills, instructions"
	@$(BIN)/python csrc/cuda/check.py

sanitize: install  ## the C++ tests under address and undefined-behaviour sanitizers (some minutes)
	@echo "==> C++ tests with sanitizers"
	@cmake -S . -B build/sanitize -G Ninja -DBOP2ND_SANITIZE=ON > /dev/null
	@cmake --build build/sanitize --parallel $(JOBS) > /dev/null
	@ctest --test-dir build/sanitize --output-on-failure --no-tests=error

sanitize-threads: install  ## the runtime's tests under the thread sanitizer (some minutes)
	@echo "==> the runtime's threads with a sanitizer"
	@cmake -S . -B build/threads -G Ninja -DBOP2ND_SANITIZE=THREAD > /dev/null
	@cmake --build build/threads --parallel $(JOBS) --target test_runtime > /dev/null
	@ctest --test-dir build/threads --output-on-failure --no-tests=error --tests-regex '^test_runtime$$'

# The sources are copied so that a `_C` with sanitizers lies beside them and the installed one stays as it is.
SANITIZED := build/sanitize/python
TESTS ?= tests/test_fuzz.py
COMMAND ?= -m pytest -x -q -s -p no:cacheprovider --timeout=0 $(TESTS)

sanitize-python: install  ## Python tests with _C under both sanitizers: TESTS="tests/... -k name"
	@echo "==> _C with sanitizers"
	@cmake -S . -B build/sanitize -G Ninja -DBOP2ND_SANITIZE=ON -DBOP2ND_PYTHON=$(CURDIR)/$(BIN)/python > /dev/null
	@cmake --build build/sanitize --parallel $(JOBS) --target python_extension > build/sanitize.log || { cat build/sanitize.log; exit 1; }
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	@git ls-files -co --exclude-standard -z | xargs -0 cp --parents --no-dereference -t $(SANITIZED)
	@cp build/sanitize/_C.abi3.so $(SANITIZED)/bop2nd_fast/
	@echo "==> python $(COMMAND)"
	@cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:$$ASAN_OPTIONS \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  PYTHONPATH=$(CURDIR)/$(SANITIZED) PYTHONMALLOC=malloc $(CURDIR)/$(BIN)/python $(COMMAND)

format: install  ## rewrite the sources in the project's style
	@echo "==> ruff format, clang-format"
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(if $(CLANG_FORMAT_SOURCES),$(BIN)/clang-format -i $(CLANG_FORMAT_SOURCES),true)

bench: install  ## every benchmark case on quick sizes; python -m benchmarks.run measures the full ones
	@echo "==> benchmarks, quick sizes (full ones: $(BIN)/python -m benchmarks.run)"
	@$(BIN)/python -m benchmarks.run --quick

fuzz: install  ## long random search against the reference
	@echo "==> fuzzing against the reference"
	@$(BIN)/python -m pytest -x -q -m fuzz --timeout=0

clean:  ## remove what was built; .venv stays
	@echo "==> removing build products (rm -r $(VENV) removes the environment)"
	@rm -rf build out dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks bop2nd_fast/_C*.so $(STAMPS)/project
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
