# make demo   the main job, end to end, on this machine
# make test   the proof: everything, with a real redis-server
# TORCH_INDEX names an index with CPU builds of torch, for CPU-only machines whose default index would
# bring gigabytes of CUDA: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test lint format serve train-reference clean

demo: $(VENV)/.runtime
	$(BIN)/aquifer demo

test: $(VENV)/.dev
	deploy/test-needs.sh
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .types/aquifer
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(VENV)/.runtime
	$(BIN)/aquifer serve

train-reference: $(VENV)/.runtime
	$(BIN)/aquifer train-reference --out server/models/reference
	$(BIN)/aquifer calibrate --model reference --out server/models/reference/predictors

$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch is large; once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps torch
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
