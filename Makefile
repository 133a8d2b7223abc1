# `make help` says what there is. Settings are given as NAME=value behind the target: make reproduce STUDY=la DATA=/path
PYTHON ?= python3
STUDY ?= phantom
WORKERS ?= 2
KILLS ?= 200

SHELL := /bin/sh
VENV := .venv
STAMP := $(VENV)/.complete
UNFINISHED := $(VENV)/.unfinished
# The recipes read these from the environment, so that a value with spaces or quotes arrives as it was typed.
export PYTHON STUDY DATASET DATA JOBS DEVICE ONLY ADOPT TORCH_INDEX ENGINE PARTITION GPUS TIME MEMORY ACCOUNT QOS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(ENV),active)
  BIN :=
  READY := active-environment
else
  BIN := $(VENV)/bin/
  READY := $(STAMP)
endif

# Without ENGINE, a TIME that was not typed is somebody's own variable: it is what `time` prints.
CLUSTER := $${ENGINE:+--engine "$$ENGINE"} $${PARTITION:+--partition "$$PARTITION"} $${GPUS:+--gpus "$$GPUS"} \
	$(if $(ENGINE)$(filter command,$(origin TIME)),$${TIME:+--time "$$TIME"}) \
	$${MEMORY:+--memory "$$MEMORY"} $${ACCOUNT:+--account "$$ACCOUNT"} $${QOS:+--qos "$$QOS"}

.DEFAULT_GOAL := help
.PHONY: help reproduce cost data bench test test-all test-faults advisories lab lint lock clean environment active-environment

help:  ## this list
	@echo "make TARGET [NAME=value ...]"
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo
	@echo "  STUDY=phantom  which study (mlrpl/studies/*.yaml)"
	@echo "  DATA=          folder of the study's data set; phantom needs none"
	@echo "  DATASET=       for make data: hippocampus, heart; la, pancreas, brats: where to register"
	@echo "  JOBS=          runs at a time (results do not depend on it); default: one a core, at most 4, or one a GPU"
	@echo "  DEVICE=        cpu, cuda, cuda:1 ...; default: a GPU where there is one"
	@echo "  ONLY=          only the runs with one of these (a,b) in their name"
	@echo "  ENGINE=slurm   queue the runs on a cluster; with PARTITION, GPUS (a run), TIME, MEMORY, ACCOUNT, QOS"
	@echo "  ADOPT=1        take committed results with the same key as finished"
	@echo "  LAB=           options for jupyter lab"
	@echo "  WORKERS=2      test processes at a time"
	@echo "  PYTHON=python3 interpreter that .venv is made with, 3.11 or newer"
	@echo "  TORCH_INDEX=   where torch's build comes from (README: CPU or CUDA)"
	@echo "  ENV=active     use the active conda or virtual environment instead of .venv"

reproduce: $(READY)  ## run a study and write results/STUDY/index.html
	@$(BIN)mlrpl reproduce "$$STUDY" $${JOBS:+--jobs "$$JOBS"} $${DATA:+--data "$$DATA"} $${DEVICE:+--device "$$DEVICE"} \
		$${ONLY:+--only "$$ONLY"} $(if $(filter-out 0,$(ADOPT)),--adopt) $(CLUSTER)

cost: $(READY)  ## how long STUDY takes on this machine, from a few steps of each of its runs
	@$(BIN)mlrpl cost "$$STUDY" $${DATA:+--data "$$DATA"} $${DEVICE:+--device "$$DEVICE"} $${ONLY:+--only "$$ONLY"}

data: $(READY)  ## download a data set into data/
	@$(BIN)mlrpl download "$${DATASET:?name one: make data DATASET=hippocampus}"

bench: $(READY)  ## time the package beside its plain formulation; results/bench/index.html
	@$(BIN)mlrpl bench $${DEVICE:+--device "$$DEVICE"}

test: $(READY)  ## all fast tests
	@$(BIN)python -m pytest -n $(WORKERS) --dist worksteal

test-all: $(READY)  ## all tests, slow ones too
	@$(BIN)python -m pytest -n $(WORKERS) --dist worksteal -m "slow or not slow"

test-faults: $(READY)  ## every fault done for real, 200 kills among them; ends with a table
	@KILLS=$(KILLS) $(BIN)python -m pytest -n $(WORKERS) --dist worksteal -m fault

advisories: $(READY)  ## known weaknesses of the locked packages; needs a network
	@[ -x .venv-audit/bin/pip-audit ] || { "$$PYTHON" -m venv .venv-audit && .venv-audit/bin/python -m pip install pip-audit; }
	@.venv-audit/bin/pip-audit --progress-spinner off --no-deps --disable-pip -r requirements.lock

lab: $(READY)  ## JupyterLab with the notebooks, at the viewer of cases
	@$(BIN)jupyter lab notebooks/07-explore.ipynb $(LAB)

lint: $(READY)  ## ruff
	@$(BIN)ruff check .

environment: $(READY)  ## only the set-up, which every target does by itself
	@echo "ready: $(BIN)mlrpl"

# An installation that was cut short leaves $(UNFINISHED) and no stamp: the next one starts over.
$(STAMP): pyproject.toml requirements.lock
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed; $$PYTHON is $$("$$PYTHON" --version 2>/dev/null || echo 'not there'). \
	Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	@echo "Setting up $(VENV) (once; some minutes, torch is large)"
	@mkdir -p $(VENV) && touch $(UNFINISHED) && rm -f $@
	@"$$PYTHON" -m venv $(VENV)
	@if [ -n "$$TORCH_INDEX" ]; then \
		$(BIN)python -m pip install --index-url "$$TORCH_INDEX" "$$(grep '^torch==' requirements.lock)"; fi
	@$(BIN)python -m pip install -r requirements.lock
	@$(BIN)python -m pip install --no-deps --no-build-isolation -e .
	@rm $(UNFINISHED) && touch $@

active-environment:
	@test -n "$$CONDA_PREFIX$$VIRTUAL_ENV" || { \
		echo "ENV=active: no conda or virtual environment is active" >&2; exit 1; }
	@command -v mlrpl >/dev/null || { echo "ENV=active: the active environment lacks mlrpl;" \
		"README, 'Installation', says how to make one with conda" >&2; exit 1; }

# Newest versions that pyproject.toml allows, tried in a fresh environment; the same list serves pip and conda.
# torch is written without its build (+cpu, +cu130), and what a CUDA build brings is pinned by torch itself.
lock:  ## write requirements.lock and environment.yml anew
	@rm -rf .venv-lock && "$$PYTHON" -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --upgrade setuptools
	@if [ -n "$$TORCH_INDEX" ]; then .venv-lock/bin/python -m pip install --index-url "$$TORCH_INDEX" torch; fi
	@.venv-lock/bin/python -m pip install ".[dev]"
	@.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude mlrpl | \
		grep -viE '^(nvidia-|cuda-|triton)' | sed 's/+.*//' >requirements.lock.new
	@{ sed '/^      - /d' environment.yml; sed 's/^/      - /' requirements.lock.new; echo '      - -e .'; } >environment.yml.new
	@mv requirements.lock.new requirements.lock && mv environment.yml.new environment.yml
	@rm -rf .venv-lock build *.egg-info

clean:  ## remove .venv and caches; runs/ and results/ stay
	rm -rf $(VENV) .venv-lock .venv-audit build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "runs/ and results/ are as they were; delete them by hand if you mean to"
