# Two commands on a fresh machine: `make demo` and `make test`. Each sets everything up by itself, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= runs/demo

# One thread per process: parallel runs do not fight over cores, and timings mean something.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-gpu check format bench bench-gpu clean setup
.DEFAULT_GOAL := help

help:
	@echo "make demo    train the paper's MNIST network with and without batch normalization, write a report (about 5 minutes)"
	@echo "make test    run the tests (about 6 minutes on two cores)"
	@echo "make test-gpu  the tests of the GPU kernels, where there is one"
	@echo "make check   lint, types, import contracts"
	@echo "make bench   measure on this machine; results are appended to benchmarks/results/"
	@echo "make bench-gpu  batch norm on the GPU, where there is one"
	@echo "make clean   remove caches and build products (runs/ and .venv/ stay)"

setup: $(READY)

# torch first and pinned, so that nothing that depends on torch pulls another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "batchlab needs Python 3.11 or newer, this is %d.%d: run make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@echo "Setting up $(VENV) (once; torch is the large part) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/batchlab study bn-mnist --size demo --out $(OUT)

test: $(READY)
	@$(BIN)/python -m pytest -n 2

# These run the same kernels in Triton's interpreter where there is no GPU, and skip what takes one, saying so.
test-gpu: $(READY)
	@$(BIN)/python -m pytest tests/kernels/test_batch_norm_gpu.py tests/kernels/test_batch_norm_gpu_layer.py tests/kernels/test_batch_norm_cuda.py tests/kernels/test_batch_norm_cuda_layer.py tests/kernels/test_batch_norm_triton.py tests/kernels/test_batch_norm_triton_statistics.py tests/kernels/test_batch_norm_triton_compiled.py

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)
	@$(BIN)/python -m benchmarks

bench-gpu: $(READY)
	@$(BIN)/python -m benchmarks.batch_norm_gpu

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
