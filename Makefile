# make demo   the whole way on real data: prepare, train on two workers, evaluate, recommend
# make test   all tests
# make lint   style, types, import contracts
# Each makes .venv first where it is missing, and again installs what requirements/ or pyproject.toml have changed.
#   PYTHON=/path/to/python3.11   FBGEMM=cpu|gpu   (see tools/setup_environment.sh)

SHELL := /bin/sh
BIN := .venv/bin
SETUP := tools/setup_environment.sh
export PYTHON FBGEMM

.PHONY: help demo test lint format docs wheel setup setup-dev clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

demo: setup
	@$(BIN)/python tools/demo.py

# Fast tests first, as many at a time as there are cores; then one by one those of several processes and of Ray; then
# those of faults, two at a time: see tests/conftest.py. PYTEST='FILES AND OPTIONS' runs what it says.
test: setup-dev
ifdef PYTEST
	@$(BIN)/python -m pytest $(PYTEST)
else
	@$(BIN)/python -m pytest -m "not processes and not faults" -n auto --dist loadfile
	@$(BIN)/python -m pytest -m processes
	@$(BIN)/python -m pytest -m faults -n 2 --dist loadfile --no-loadscope-reorder
endif

lint: setup-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright
	$(BIN)/lint-imports

format: setup-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: setup
	$(BIN)/python tools/config_reference.py

wheel: setup-dev
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

setup: .venv/.package
setup-dev: .venv/.package .venv/.development

# A stamp is touched only after its step has ended well: an interrupted set-up is done again.
.venv/.runtime: requirements/base.txt requirements/tables-cpu.txt requirements/tables-gpu.txt $(SETUP)
	@$(SETUP) runtime
	@touch $@

.venv/.package: .venv/.runtime pyproject.toml
	@$(SETUP) package
	@touch $@

.venv/.development: .venv/.runtime requirements/dev.txt requirements/s3.txt
	@$(SETUP) development
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
