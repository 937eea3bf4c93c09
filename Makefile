# Every target does all of its own set-up; a repeat takes a second when nothing changed.
#   make demo | test | check | lab | setup | notebooks | stress | bench | bench-gpu | lint | format | clean
# Variables: PYTHON (default python3, 3.11 or newer); TORCH_INDEX, an extra pip index that offers builds of torch
# (a CPU build, say); LAB_ARGS, more options for JupyterLab (as root it wants --allow-root);
# TINYLAB_HOME, the folder of data/ and runs/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH_INDEX ?=
LAB_ARGS ?=
BIN := .venv/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS := $(if $(GPU),env/constraints.txt,env/constraints-cpu.txt)

# One stamp per content: Python and its version, this folder, the requirements and the pins.
KEYS := $(shell $(PYTHON) -c "import hashlib, os, pathlib, sys; \
	assert sys.version_info >= (3, 11); \
	python = hashlib.sha256(repr((sys.version, sys.base_prefix, os.getcwd())).encode()); \
	print(python.hexdigest()[:12]); \
	files = ['pyproject.toml', 'env/constraints.txt', 'env/constraints-cpu.txt', *sorted(map(str, pathlib.Path('env/jupyter').iterdir()))]; \
	[python.update(pathlib.Path(p).read_bytes()) for p in files]; \
	python.update(b'$(CONSTRAINTS)'); \
	print(python.hexdigest()[:12])" 2>/dev/null)
VENV := .venv/.python-$(word 1,$(KEYS))
STAMP := .venv/.setup-$(word 2,$(KEYS))

.PHONY: setup demo test check lab notebooks stress bench bench-gpu lint format clean

setup: $(STAMP)

$(VENV):
	@test -n "$(KEYS)" || { echo "$(PYTHON) must be Python 3.11 or newer (make PYTHON=/path/to/python3.11 …)" >&2; exit 2; }
	@# Keep an environment that this Python made in this folder; otherwise (moved, copied, another Python) make it anew.
	@version=$$($(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])"); \
	$(BIN)/pip --version 2>/dev/null | grep -qF "$(CURDIR)/.venv/lib/python$$version/" \
	  || { echo "making .venv with Python $$version"; $(PYTHON) -m venv --clear .venv; }
	@rm -f .venv/.python-* && touch $@

$(STAMP): $(VENV)
	@echo "installing into .venv with the pins of $(CONSTRAINTS) (minutes the first time)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --progress-bar off \
	  -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -e ".[notebook,evaluate,dev]"
	@$(BIN)/python -m ipykernel install --sys-prefix --name tinylab --display-name tinylab \
	  --env GOMP_SPINCOUNT 1000 >/dev/null
	@# JupyterLab: no question about news. Git: a notebook that was run and saved is unchanged (.gitattributes).
	@mkdir -p .venv/share/jupyter/lab/settings .venv/etc/jupyter
	@cp env/jupyter/overrides.json .venv/share/jupyter/lab/settings/
	@cp env/jupyter/jupyter_server_config.py .venv/etc/jupyter/
	@git config filter.tinylab-notebook.clean "python3 env/jupyter/strip_notebook.py" 2>/dev/null || true
	@rm -f .venv/.setup-* && touch $@
	@echo "ready: $(BIN)/tinylab --help"

demo: setup
	@$(BIN)/tinylab demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not stress and not gpu"

# Quick tests, none of which trains or starts a kernel, a browser or another Python; then the types.
QUICK := config data/test_order.py data/test_mixture.py data/test_shards.py evaluation/test_published.py \
	evaluation/test_statistics.py formats html model optim runs test_contributing.py test_layers.py test_planner.py test_readme.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not stress and not gpu" $(QUICK:%=tests/%) \
	  --ignore=tests/model/test_training_parity.py
	$(BIN)/pyright

# Every goal of docs/reliability.md at its full count: hours. only=R1 runs one goal; a repeat leaves out what has passed.
stress: setup
	@code=0; OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m "stress or goal" --campaign=build/stress \
	  $(if $(only),--goal=$(only)) || code=$$?; \
	$(BIN)/python tests/goals.py build/stress >docs/reliability.md; exit $$code

# Local only, with Jupyter's token; papermill and the kernel find runs in the folder of this file.
lab: setup
	TINYLAB_HOME="$${TINYLAB_HOME:-$(CURDIR)}" GOMP_SPINCOUNT=1000 $(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
	  --LabApp.default_url=/lab/tree/notebooks --LabApp.news_url=None $(LAB_ARGS)

notebooks: setup
	@$(BIN)/tinylab demo --again notebooks

bench: setup
	$(BIN)/tinylab bench train --against transformers

bench-gpu: setup
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/tinylab bench train --against transformers --device cuda

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment and caches; never data/ or runs/.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
