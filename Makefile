# make demo       train a small Mixture-of-Experts language model on 8 virtual CPU devices
# make test       run the tests
# make -j4 test-gpu   run them on all GPUs of this machine, 2, 4 or 8, by every path of the kernels,
#                 in one process and in one per GPU, with failures and a stress run
# make lint       check formatting, style and types; make format applies what can be applied
# make wheel      build a wheel in dist/
#
# They count when .venv is made: make clean first.
# PYTHON   the interpreter of .venv                          make test PYTHON=python3.13
# JAX      the version to install                            make test JAX=0.12.0
# EXTRAS   further extras, with a GPU cuda12 or cuda13       make test EXTRAS=cuda13
# CUDACXX, CUDAARCHS, CMAKE_BUILD_PARALLEL_LEVEL: see CMakeLists.txt
PYTHON ?= $(shell command -v python3.12 || command -v python3)
JAX ?= 0.11.2
EXTRAS ?= examples,test
BIN := .venv/bin
SOURCES := $(wildcard ffi/*.h ffi/*.cuh ffi/*.cc ffi/*.cu)
TEST_SOURCES := $(wildcard $(foreach kind,h cuh cc,tests/native/*.$(kind) tests/native/emulated/*.$(kind)))
# An editable install maps the modules it finds: a folder is newer when one is added or removed.
PACKAGE_FOLDERS := jax_moe_ep $(patsubst %/__init__.py,%,$(wildcard jax_moe_ep/*/__init__.py))
PYTHON_SOURCES := jax_moe_ep tests examples benchmarks

NUM_GPUS = $(shell nvidia-smi -L | wc -l)
PER_GPU = $(BIN)/python tests/launch.py --num-processes $(NUM_GPUS) --timeout 1800 --
# The tests that run in any number of processes, once for every implementation.
SEMANTIC_TESTS := $(patsubst %,tests/test_%.py,plan dispatch combine drops gradients properties)

.PHONY: demo test test-gpu lint format wheel clean

demo: .venv/installed
	$(BIN)/python examples/03_flax_moe_lm.py --small

test: .venv/installed
	$(BIN)/python -m pytest

# First what can share the GPUs, so at once with make -j4 test-gpu; then what is about time and
# memory, one after the other. Tests start processes of their own, which need memory too.
GPU_PARTS := gpu-suite gpu-vector gpu-staged gpu-processes
GROUP_TESTS := tests/test_group.py tests/test_group_reuse.py tests/test_group_cold.py
GPU_ALONE := $(GROUP_TESTS) tests/test_group_pool.py tests/test_group_failures.py
# So that processes read each other's tokens in place.
POOL := XLA_PYTHON_CLIENT_PREALLOCATE=true XLA_PYTHON_CLIENT_MEM_FRACTION=.1
PYTEST := $(BIN)/python -m pytest

test-gpu $(GPU_PARTS) gpu-alone: export JAX_MOE_EP_REQUIRE_GPUS = $(NUM_GPUS)
test-gpu $(GPU_PARTS) gpu-alone: export XLA_PYTHON_CLIENT_PREALLOCATE = false
test-gpu: gpu-alone
gpu-alone: | $(GPU_PARTS)
$(GPU_PARTS): | gpus

.PHONY: gpus gpu-alone $(GPU_PARTS)
gpus: .venv/installed
	@test $(NUM_GPUS) -gt 0 || { echo "make test-gpu: nvidia-smi finds no GPU" >&2; exit 1; }

gpu-suite:
	$(PYTEST) $(GPU_ALONE:%=--ignore=%)

gpu-vector:
	JAX_MOE_EP_FORCE_VECTOR=1 JAX_MOE_EP_FORCE_LARGE=1 $(PYTEST) $(SEMANTIC_TESTS) tests/test_one_rank.py -k cuda

gpu-staged:
	JAX_MOE_EP_FORCE_STAGED=1 $(PYTEST) $(SEMANTIC_TESTS) -k cuda

gpu-processes:
	$(POOL) $(PER_GPU) -m pytest $(SEMANTIC_TESTS) -k cuda
	$(PER_GPU) -m pytest tests/test_sequence_parallel.py tests/test_map_plans.py

gpu-alone:
	$(PYTEST) $(GPU_ALONE)
	JAX_MOE_EP_FORCE_VECTOR=1 JAX_MOE_EP_FORCE_LARGE=1 $(PYTEST) $(GROUP_TESTS)
	JAX_MOE_EP_FORCE_STAGED=1 $(PYTEST) $(GROUP_TESTS)
	$(POOL) $(PER_GPU) -m pytest $(GROUP_TESTS)
	JAX_MOE_EP_FORCE_STAGED=1 $(PER_GPU) -m pytest $(GROUP_TESTS)
	$(BIN)/python tests/stress.py
	$(POOL) $(PER_GPU) tests/stress.py
	for n in 2 4; do test $$((2 * n)) -gt $(NUM_GPUS) || { \
		$(BIN)/python tests/stress.py --group-size $$n --steps 4000 && \
		$(PER_GPU) tests/stress.py --group-size $$n --steps 4000; } || exit 1; done

lint: .venv/linters
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(TEST_SOURCES)
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/linters
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(SOURCES) $(TEST_SOURCES)

wheel: .venv/installed
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist out

# The extension is built with what is in .venv, so that PyPI's nvcc is found there too.
.venv/installed: pyproject.toml CMakeLists.txt $(SOURCES) $(PACKAGE_FOLDERS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group build "jax==$(JAX)"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[examples,test,$(EXTRAS)]" \
		--config-settings=cmake.define.JAX_MOE_EP_WERROR=ON
	touch $@

.venv/linters: .venv/installed
	$(BIN)/pip install --quiet --group lint
	touch $@
