# `make demo` and `make test` are the two commands of the README; both set up .venv first.
#
#   PYTHON=python3.11    the interpreter that .venv is made from (3.10 to 3.12)
#   DEMO_ARGS="..."      options of `groot-int8 demo`
#   PYTEST_ARGS="..."    options of pytest
#   SOAK_ARGS="..."      options of `groot-int8 soak`, as --minutes 5

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The environment is up to date when the content it was made from is, whatever the file times say.
digest = $(shell cat $(1) | sha256sum | cut -c 1-16)
LOCK_STAMP := $(VENV)/.locked-$(call digest,requirements.lock)
PACKAGE_STAMP := $(VENV)/.installed-$(call digest,setup.py setup.cfg groot_int8_ros/__init__.py)

# -qq: an index that pip is configured with but that lacks a package is a page of warnings, not news.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -qq

# The simulated robot's cameras draw off screen, through EGL unless MUJOCO_GL says otherwise.
DRAWS := MUJOCO_GL=$${MUJOCO_GL:-egl} $(BIN)/python -c \
    'import mujoco; mujoco.GLContext(16, 16).free()' >/dev/null 2>&1

.PHONY: help setup test faults fuzz soak demo format lock clean

help:
	@echo "make demo    the shipped policy in INT8 moves the simulated robot (options: DEMO_ARGS)"
	@echo "make test    format, lint, types and tests (options of pytest: PYTEST_ARGS)"
	@echo "make setup   make .venv, or bring it up to date; demo and test do it themselves"
	@echo "make faults  the long form of the fault matrix: 66 signals at random moments"
	@echo "make soak    both nodes for 30 minutes at full camera load (options: SOAK_ARGS)"
	@echo "make fuzz    the long form of the malformed files: 2000 of each kind, other ones each time"
	@echo "make format  rewrite the code in the project's format"
	@echo "make lock    choose the newest versions anew and write requirements.lock"
	@echo "make clean   remove .venv and what builds and tests left behind"

setup: $(PACKAGE_STAMP)
	@:

$(LOCK_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
	    echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), and the locked versions are for" \
	         "Python 3.10 to 3.12; run 'make $(MAKECMDGOALS) PYTHON=python3.11'" >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	        if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
	            echo "setup: $(PYTHON) has no venv module; installing the package python3-venv"; \
	            apt-get update -qq && apt-get install -y -qq python3-venv; \
	        else \
	            echo "make: $(PYTHON) cannot make virtual environments; install it," \
	                 "for example with 'sudo apt install python3-venv', and run make again" >&2; \
	            exit 1; \
	        fi; \
	    fi; \
	    echo "setup: making $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "setup: installing requirements.lock into $(VENV); the first time takes minutes"
	@$(PIP_INSTALL) --requirement requirements.lock
	@$(DRAWS) || { \
	    if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
	        echo "setup: MuJoCo cannot draw here; installing libegl1 and libgl1-mesa-dri"; \
	        apt-get update -qq && apt-get install -y -qq libegl1 libgl1-mesa-dri >/dev/null; \
	    fi; \
	    $(DRAWS) || echo "setup: MuJoCo cannot draw without a display here, so the simulated" \
	        "robot does not run; 'sudo apt install libegl1 libgl1-mesa-dri' mends that" >&2; \
	}
	@rm -f $(VENV)/.locked-* && touch $@

$(PACKAGE_STAMP): $(LOCK_STAMP)
	@echo "setup: installing this package into $(VENV), editable"
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@$(BIN)/groot-int8 --version >/dev/null
	@rm -f $(VENV)/.installed-* && touch $@

# A test that hangs fails, and a machine on which all fails is soon left: the whole has its limit too.
PYTEST := $(BIN)/python -m pytest --timeout 300 --maxfail 12

test: setup
	@echo "test: format" && $(BIN)/ruff format --quiet --check .
	@echo "test: lint" && $(BIN)/ruff check --quiet .
	@echo "test: types" && $(BIN)/mypy
	@echo "test: pytest" && $(PYTEST) $(PYTEST_ARGS)

faults: setup
	@GROOT_FAULT_ROUNDS=50 $(BIN)/python -m pytest test/faults $(PYTEST_ARGS)

# Rows of 0.1 s: a chunk lasts longer than two inferences of a small machine.
SOAK := build/soak
$(SOAK)/bundle: | $(PACKAGE_STAMP)
	@rm -rf $(SOAK) && mkdir -p $(SOAK)
	@$(BIN)/groot-int8 make-dataset --cameras 4 --frames 60 --output $(SOAK)/data
	@$(BIN)/groot-int8 make-checkpoint --dataset $(SOAK)/data --output $(SOAK)/ckpt
	@echo "action_period_s: 0.1" > $(SOAK)/robot.yaml
	@$(BIN)/groot-int8 export --checkpoint $(SOAK)/ckpt --dataset $(SOAK)/data \
	    --robot $(SOAK)/robot.yaml --precision fp32 --denoising-steps 2 --bundle $@

soak: setup $(SOAK)/bundle
	@$(BIN)/groot-int8 soak --bundle $(SOAK)/bundle $(SOAK_ARGS)

fuzz: setup
	@GROOT_FUZZ_EXAMPLES=$${GROOT_FUZZ_EXAMPLES:-2000} $(BIN)/python -m pytest test/security $(PYTEST_ARGS)

demo: setup
	@$(BIN)/groot-int8 demo $(DEMO_ARGS)

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: setup
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	    --extra ros --extra offline --extra rtx --extra sim --extra dev \
	    --custom-compile-command 'make lock' --output-file requirements.lock setup.py

clean:
	@rm -rf $(VENV) build dist install log .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -rf *.egg-info
	@find groot_int8_ros offline_tools launch test -name __pycache__ -prune -exec rm -rf {} +
