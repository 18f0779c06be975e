# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

PYTHON ?= python3
CONFIG ?= experiments/configs/digits.py
WORKDIR ?= runs/digits
SCALE ?= quick
NAME ?= tensor_mlp
SUITE ?= fresh,data,size,horizon,architecture,loss
BASELINES ?= adamw,muon
TASKS ?= 3
SEEDS ?= 2
ROUNDS ?= 1
ARCHITECTURES ?= tensor_mlp|mlp|adafactor_mlp|lstm
BIN = .venv/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal
COMPILE := --universal --fork-strategy fewest --python-version 3.11

.DEFAULT_GOAL := help
.PHONY: help meta-train reproduce-pretrained report evaluate architectures bench check-tpu paper test test-all test-newest check format requirements clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 28

meta-train: .venv/runtime  ## meta-train an optimizer on digits (or CONFIG=..., WORKDIR=...); resumes if interrupted
	$(BIN)/python experiments/meta_train.py --config=$(CONFIG) --workdir=$(WORKDIR)

reproduce-pretrained: .venv/runtime  ## train again what comes with lopt: NAME=tensor_mlp or adafactor_mlp
	$(BIN)/python experiments/meta_train.py --config=experiments/configs/pretrained.py:architecture=$(NAME) \
	  --workdir=runs/pretrained/$(NAME)

report: .venv/runtime  ## compare NAME with tuned baselines on held-out suites, into runs/report/report.html
	$(BIN)/python experiments/evaluate.py --optimizer=$(NAME) --suite=$(SUITE) --baselines=$(BASELINES) \
	  $(if $(TASKS),--num_tasks=$(TASKS)) $(if $(SEEDS),--num_seeds=$(SEEDS)) --output=runs/report

evaluate: .venv/runtime  ## compare the optimizer trained in WORKDIR with tuned baselines on held-out tasks
	$(BIN)/python experiments/evaluate.py --optimizer=$(WORKDIR)

architectures: .venv/runtime  ## meta-train each architecture for a minute or so and compare it with its first weights
	$(BIN)/python experiments/architectures.py

bench: .venv/runtime  ## measure and draw speed and memory into runs/benchmarks/ (ROUNDS=1, ARCHITECTURES=...)
	$(BIN)/python experiments/benchmarks/throughput.py --rounds=$(ROUNDS) \
	  --only='^($(ARCHITECTURES))/(quad/8|mlp8/(8|64|256)|mlp28/8)/20$$'
	$(BIN)/python experiments/benchmarks/update_cost.py --rounds=$(ROUNDS) \
	  --only='^(adam|muon|direction/tensor_mlp|$(ARCHITECTURES))/mlp/[456]$$'
	$(BIN)/python experiments/benchmarks/scaling.py --rounds=$(ROUNDS)
	$(BIN)/python experiments/benchmarks/update_compile.py --rounds=$(ROUNDS) --only='^(adamw|muon|direction/tensor_mlp)$$'
	$(BIN)/python experiments/benchmarks/first_step.py --rounds=$(ROUNDS)
	$(BIN)/python experiments/benchmarks/picture.py

check-tpu: .venv/runtime .venv/tpu  ## compile every architecture and estimator for four TPU chips, without one
	TPU_LIBRARY_PATH=.venv/tpu/libtpu/libtpu.so $(BIN)/python experiments/check_tpu.py

paper: .venv/runtime  ## run the eight experiments of the PES paper (SCALE=full: its sizes) into runs/paper/index.html
	$(BIN)/python experiments/paper/run_all.py --scale=$(SCALE)

test: .venv/dev  ## run the tests but for those that take long, in 6 to 8 minutes
	$(PYTEST)

test-all: .venv/dev  ## run all tests but for those that take minutes each (pytest -m long), in half an hour
	$(PYTEST) -m "not long"

test-newest: BIN = .venv-newest/bin
test-newest:  ## run the quick tests with the newest versions of all packages, in .venv-newest
	$(PYTHON) -m venv --clear .venv-newest
	$(PIP_INSTALL) --editable '.[dev]'
	$(PYTEST)

check: .venv/dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: .venv/dev  ## format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

requirements:  ## pin the newest versions that pyproject.toml allows (needs uv)
	uv pip compile --quiet --upgrade $(COMPILE) pyproject.toml -o requirements.txt
	uv pip compile --quiet --upgrade $(COMPILE) --extra dev -c requirements.txt pyproject.toml -o requirements-dev.txt
	uv pip compile --quiet --upgrade $(COMPILE) --extra paper -c requirements-dev.txt pyproject.toml -o requirements-paper.txt

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps .venv/runtime and .venv/dev say that what is installed is what these files ask for.

.venv/runtime: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "lopt needs Python 3.11 or newer; $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-deps --editable .
	@touch $@

# Beside the packages, not among them: JAX would look for a TPU at every start.
.venv/tpu: .venv/runtime
	$(PIP_INSTALL) --target $@ --no-deps "libtpu==$$($(BIN)/python -c 'import importlib.metadata as m, re; \
	  print(re.search(r"libtpu==([0-9.*]+)", " ".join(m.requires("jax"))).group(1))')"
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@
