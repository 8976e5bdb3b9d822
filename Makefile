# Everything sets itself up in .venv; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two versions of one package for the test of TensorRT's API: they share no environment, so they have no constraint.
TRT_BINDINGS := 10.16.1.11 11.4.0.106
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types pytest setup clean

demo: $(READY)
	$(BIN)/chipdeploy demo

test: lint types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --strict cli profiles
	$(BIN)/mypy benchmarks/*.py

pytest: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "chipdeploy needs Python 3.11 to 3.13, got " + sys.version.split()[0] + "; call: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[cpu,dev,rtx,zoo]'
	for version in $(TRT_BINDINGS); do \
		$(PIP) --no-deps --upgrade --target $(VENV)/trt-bindings/$${version%%.*} tensorrt-cu13-bindings==$$version || exit 1; \
	done
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
