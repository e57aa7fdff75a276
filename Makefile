# `make demo` and `make test` are all that a newcomer needs: both build .venv by themselves.
#
#   PYTHON=python3.12      which interpreter .venv is made from (3.11 or later)
#   PYTEST_ARGS="-x -k round"   more arguments for pytest
#   ROWS=5,46 SEEDS=6 DATA=fashion-mnist   what `make evidence-seeds` runs
#   SAMPLE=40 SEED=1 MOMENTS=300   which kills `make kill-anywhere` does; all points and 300 moments without
#   SEED=1                 which slow scenarios `make test` draws
#   MINUTES=20 RATE=300 SEED=1   how long `make chaos` storms, how many faults an hour, and which
#   PEERS_ARGS="--sizes 10,100 --readme"   what `make bench-peers` does
#
# Where packages come from is pip's own business: its environment variables and configuration
# files (PIP_INDEX_URL, PIP_FIND_LINKS, …) are honoured and never overridden.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY_TO_RUN := $(VENV)/.ready-to-run
READY_TO_DEVELOP := $(VENV)/.ready-to-develop
PEERS := build/peers

PYTHON ?=
PYTEST_ARGS ?=
# Two processes: what shares a Ray stays together (tests/conftest.py), and each federation of the
# tests has up to eight processes of its own.
WORKERS ?= -n 2 --dist loadgroup
DEMO_ARGS ?=
ROWS ?=
SEEDS ?=
DATA ?=
SAMPLE ?= 0
SEED ?= 0
MOMENTS ?= 300
MINUTES ?= 20
RATE ?= 300
BENCH_ARGS ?=
PEERS_ARGS ?=
RUNS ?= 1000000

.PHONY: help demo test test-all check format protos docs evidence-seeds evidence-calibration evidence-distillation bench bench-exchange bench-rounds bench-codec bench-peers kill-anywhere chaos fuzz env clean

help: ## say what the targets do
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

# ------------------------------------------------------------------------------ what people want

demo: $(READY_TO_RUN) ## train one model across three sites, with a page in the browser
	@exec $(BIN)/farflung demo $(DEMO_ARGS)

test: $(READY_TO_DEVELOP) ## everything fast and a seeded sample of the slow (at most 10 minutes)
	SEED=$(SEED) $(BIN)/python -m pytest -m "not slow" $(WORKERS) $(PYTEST_ARGS)

test-all: $(READY_TO_DEVELOP) ## every test (at most 60 minutes)
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

check: $(READY_TO_DEVELOP) ## ruff, mypy, import-linter, generated code, exports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/architecture/generated_protos.py
	$(BIN)/python -m pytest -q tests/architecture/test_imports.py -k facade_exports

format: $(READY_TO_DEVELOP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy-protobuf comes as a plug-in of the compiler, which finds it on PATH.
protos: $(READY_TO_DEVELOP) ## regenerate the code beside protos/v1/*.proto
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . \
		--python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. protos/v1/*.proto

docs: $(READY_TO_DEVELOP) ## write docs/configuration.md and docs/strategies from the code
	$(BIN)/python -m docs.generate

evidence-seeds: $(READY_TO_DEVELOP) ## check the claims of papers: ROWS=5,46 SEEDS=6
	$(BIN)/python -m benchmarks.evidence_seeds $(if $(ROWS),--rows $(ROWS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data $(DATA))

evidence-calibration: $(READY_TO_DEVELOP) ## losses, maps and sets over five sites: SEEDS=6 (an hour or two)
	$(BIN)/python -m benchmarks.calibration $(if $(SEEDS),--seeds $(SEEDS))
	$(BIN)/python -m benchmarks.calibration_cost

evidence-distillation: $(READY_TO_DEVELOP) ## what distillation at the orchestrator is worth: SEEDS=6
	$(BIN)/python -m benchmarks.distillation $(if $(SEEDS),--seeds $(SEEDS))

bench: bench-exchange bench-rounds bench-codec ## every benchmark of `farflung bench`

bench-exchange: $(READY_TO_RUN) ## seconds, bytes and memory of one round's exchange
	$(BIN)/farflung bench exchange $(BENCH_ARGS)

bench-rounds: $(READY_TO_RUN) ## what a round costs without its bytes
	$(BIN)/farflung bench rounds

bench-codec: $(READY_TO_RUN) ## what one core encodes and decodes in a second
	$(BIN)/farflung bench codec

bench-peers: $(READY_TO_RUN) $(PEERS)/flower/.ready $(PEERS)/flare/.ready ## the same beside Flower and NVIDIA FLARE (a quarter of an hour)
	$(BIN)/python -m benchmarks.peers $(PEERS_ARGS)

kill-anywhere: $(READY_TO_DEVELOP) ## SIGKILL at every fault point of both ends and at random moments: SAMPLE=40 SEED=1 MOMENTS=300
	$(BIN)/python -m tests.chaos.kill_anywhere --seed $(SEED) --sample $(SAMPLE) --random $(MOMENTS)

chaos: $(READY_TO_DEVELOP) ## a storm of faults against a real federation: MINUTES=20 RATE=300 SEED=1 (and as long again)
	$(BIN)/python -m tests.chaos.storm --minutes $(MINUTES) --rate $(RATE) --seed $(SEED)

fuzz: $(READY_TO_DEVELOP) ## random bytes, led by coverage, against everything that decodes what is received: RUNS=1000000
	$(BIN)/python -m tests.chaos.fuzz --runs $(RUNS)

env: $(READY_TO_DEVELOP) ## only make .venv

clean: ## remove .venv and what the tools left behind
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find farflung.py benchmarks deploy orchestrator protos site_agent strategies tests \
		-name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# ------------------------------------------------------------------------------- the environment

# The first interpreter that runs and is recent enough; PYTHON=… overrides the search.
define FIND_PYTHON
found=""; \
for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
    found="$$candidate"; break; \
  fi; \
done; \
if [ -z "$$found" ]; then \
  echo "Farflung needs Python 3.11 or later, and none of these is one: $(or $(PYTHON),python3, python3.13, python3.12, python3.11)." >&2; \
  echo "On Debian or Ubuntu: apt-get install python3 python3-venv. Elsewhere: make PYTHON=/path/to/python3.11 …" >&2; \
  exit 1; \
fi; \
if ! "$$found" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
  version=$$("$$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
  echo "$$found (Python $$version) comes without venv, so .venv can't be made." >&2; \
  echo "On Debian or Ubuntu the package python$$version-venv brings it (python3-venv for the system's own Python): apt-get install python$$version-venv" >&2; \
  exit 1; \
fi
endef

$(BIN)/python:
	@$(FIND_PYTHON); echo "Making $(VENV) with $$found"; "$$found" -m venv --clear $(VENV)

# Each stamp is written last, so an interrupted installation is taken up again. Someone who only
# looks at the demo does not have to wait for the linters.
$(READY_TO_RUN): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Farflung into $(VENV) (torch and Ray are large: some minutes, the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[orchestrator,examples]'
	@touch $@

$(READY_TO_DEVELOP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Farflung and its development tools into $(VENV) (some minutes, the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[orchestrator,examples,dev]'
	@touch $(READY_TO_RUN) $@

# An environment of its own for each peer: their requirements and ours exclude each other.
$(PEERS)/%/.ready: benchmarks/peers/%.txt | $(BIN)/python
	@echo "Installing the peer into $(@D) (some minutes, the first time)"
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@
