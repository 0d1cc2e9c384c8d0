# The environment is made once and again whenever the pins, the metadata or the C++ sources change.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALLED := $(VENV)/.installed
PINNED := $(VENV)/.pinned
CSRC := $(shell find csrc -type f 2>/dev/null)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export OMP_NUM_THREADS ?= 1

.PHONY: venv check test demo demo-tiny clean

venv: $(INSTALLED)

$(PINNED): requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed (the versions in requirements.lock are for it): make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.lock
	@touch $@

$(INSTALLED): $(PINNED) pyproject.toml setup.py $(CSRC)
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/contract/test_layering.py

test: venv
	$(BIN)/python -m pytest -q

demo: venv
	$(BIN)/megatron-replay demo

demo-tiny: venv
	$(BIN)/megatron-replay demo --tiny

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_replay tests -name __pycache__ -prune -exec rm -rf {} +
	find megatron_replay -name '*.so' -delete
