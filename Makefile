# The environment is made once, and again whenever the pins, the metadata or the C++ sources change.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALLED := $(VENV)/.installed
PINNED := $(VENV)/.pinned
CSRC := $(shell find csrc -type f 2>/dev/null)
MEGATRON_OLD := 0.12.1
OLD := $(VENV)/megatron-0.12
TORCH_NPU := 2.13.0
NPU := $(VENV)/torch-npu-$(TORCH_NPU)
SANITIZED := build/sanitized
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED_PYTHON = PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))" $(BIN)/python -P
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export OMP_NUM_THREADS ?= 1

.PHONY: venv check test test-slow test-all test-megatron-0.12 sanitize torch-npu test-npu demo demo-tiny clean

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

# Two files at a time: most tests leave a core idle, and ranks are several processes. `make test` leaves out the slow
# ones. These take long, or go on with a matrix of layouts, optimizers or versions whose first cases `make test` runs.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
test: venv
	$(PYTEST) -m "not slow"

test-slow: venv
	$(PYTEST) -m slow

# Everything that .ci/run checks, but for the installation.
test-all: check torch-npu test test-slow sanitize test-megatron-0.12

# All tests over ranks run with the oldest megatron-core that is supported (MindSpeed pins it). It lies beside the
# environment and is found before it.
test-megatron-0.12: $(OLD)/.$(MEGATRON_OLD)
	PYTHONPATH=$(CURDIR)/$(OLD) $(BIN)/python -c 'import megatron.core as m; assert m.__version__ == "$(MEGATRON_OLD)", m.__file__'
	PYTHONPATH=$(CURDIR)/$(OLD) $(BIN)/python -m pytest -q tests/ranks

$(OLD)/.$(MEGATRON_OLD): | $(INSTALLED)
	rm -rf $(OLD)
	$(PIP) install --no-deps --target $(OLD) megatron-core==$(MEGATRON_OLD)
	@touch $@

# The compiled kernels' tests run under the address and undefined-behaviour sanitizers, on a copy of the package with
# C++ of its own. The sanitizers' runtimes must be loaded before python, and libstdc++ with them, whose exceptions
# they watch. Leaks are not looked for, because Python does not free everything at exit. --capture=sys keeps pytest
# from holding back a sanitizer's message when it ends the process.
sanitize: $(SANITIZED)/.built
	find megatron_replay -name '*.py' -exec cp --parents -t $(SANITIZED) {} +
	$(SANITIZED_PYTHON) -c 'import torch; from megatron_replay import _C; print(_C.__file__)' | xargs nm -D | grep -q __asan_init
	$(SANITIZED_PYTHON) -m pytest -q --capture=sys -p no:cacheprovider tests/kernels

$(SANITIZED)/.built: setup.py $(CSRC) | $(INSTALLED)
	rm -rf $(SANITIZED)
	MEGATRON_REPLAY_CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	@touch $@

# torch-npu's wheel gets a folder of its own: on the path it breaks `import torch` where CANN is absent. The tests'
# child processes find it there. Without it, or on machines that it is not for, the tests are skipped.
torch-npu: $(NPU)/.installed

test-npu: torch-npu
	$(BIN)/python -m pytest -q tests/npu

$(NPU)/.installed: | $(INSTALLED)
	rm -rf $(NPU)
	$(PIP) install --no-deps --target $(NPU) torch-npu==$(TORCH_NPU) || mkdir -p $(NPU)
	@touch $@

demo: venv
	$(BIN)/megatron-replay demo

demo-tiny: venv
	$(BIN)/megatron-replay demo --tiny

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_replay tests -name __pycache__ -prune -exec rm -rf {} +
	find megatron_replay -name '*.so' -delete
