# `make serve` and `make test` set up what is missing. `make help` lists everything.
CONFIG ?= configs/local.yaml
PORT ?=
GPU ?=

DEVICE := $(if $(filter 1,$(GPU)),gpu,cpu)
# The two builds install the same modules, so each has an environment of its own.
VENV := $(if $(filter 1,$(GPU)),.venv-gpu,.venv)
BIN := $(VENV)/bin
INDEX := .run/index/catalog

.PHONY: soak help setup setup-dev setup-clients index serve stop lint test test-unit test-cluster-files manifests clean simulate bench bench-gpu
.SILENT:
# `make -j` would set up one environment twice at a time.
.NOTPARALLEL:

help:
	echo "make serve [CONFIG=configs/local.yaml] [PORT=8000] [GPU=1]   serve a config in the foreground"
	echo "make stop                  stop it from another terminal"
	echo "make test | test-unit      all tests | those that need no other process"
	echo "make soak                  eleven minutes of constant load on a scaling variant"
	echo "make simulate              compare scaling policies on simulated traffic (3 min); pictures in .run/simulate"
	echo "make bench                 every benchmark that a CPU can run; tables, JSON and charts"
	echo "make bench-gpu             the three published shapes on this machine's GPU (8 min)"
	echo "make setup | index | lint | manifests | clean"

setup:
	scripts/setup.sh $(VENV) $(DEVICE) run

setup-dev:
	scripts/setup.sh $(VENV) $(DEVICE) dev

setup-clients: setup-dev
	scripts/setup-clients.sh $(BIN)/python

# Rebuilt when the catalogue is newer, or how its text becomes terms.
index: setup
	if [ ! -d $(INDEX) ] || [ examples/catalog.jsonl -nt $(INDEX)/manifest.json ] || \
	   [ serve_app/recall/analysis.py -nt $(INDEX)/manifest.json ]; then \
	  $(BIN)/serve-app index build --input examples/catalog.jsonl --index $(INDEX); \
	fi

serve: setup index
	exec $(BIN)/serve-app up "$(CONFIG)" $(if $(PORT),--port $(PORT))

# Either environment's command finds what the other's serves.
stop:
	for bin in .venv/bin .venv-gpu/bin; do \
	  if [ -x $$bin/serve-app ]; then exec $$bin/serve-app down $(if $(PORT),--port $(PORT)); fi; \
	done

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-unit: setup-dev
	$(BIN)/pytest -q -n auto tests/unit

# The manifests, launcher files, alert rules and dashboard of cluster/.
test-cluster-files: setup-dev
	$(BIN)/pytest -q tests/cluster_files

# After a change of configs/ or of an overlay's config.yaml.
manifests: setup-dev
	$(BIN)/python cluster/kuberay/generate.py

test: lint setup-clients index
	$(BIN)/pytest -q -n auto tests/unit tests/cluster_files tests/processes
	$(BIN)/pytest -q -n 2 --dist loadfile tests/commands
	$(BIN)/pytest -q -n 2 --dist loadfile tests/engines
	$(BIN)/pytest -q tests/system
	$(BIN)/pytest -q tests/rollout
	$(BIN)/pytest -q tests/ui
	$(BIN)/pytest -q tests/cluster
	$(BIN)/pytest -q tests/draining

# Eleven minutes of constant load, too long for every run.
soak: setup-dev
	$(BIN)/pytest -q -s -m soak tests/cluster

simulate: setup-dev
	mkdir -p .run/simulate
	$(BIN)/serve-app simulate --trace all --json .run/simulate/comparison.json --png .run/simulate/comparison.png

bench:
	scripts/setup.sh $(VENV) $(DEVICE) bench
	$(BIN)/python -m bench

# Asked first, because the GPU build takes minutes to install.
bench-gpu:
	nvidia-smi -L 2>/dev/null || { echo "make bench-gpu: nvidia-smi finds no NVIDIA GPU here" >&2; exit 2; }
	scripts/setup.sh .venv-gpu gpu dev
	.venv-gpu/bin/python -m bench.gpu

clean:
	rm -rf .venv .venv-gpu .venv-clients .run .pytest_cache .mypy_cache .ruff_cache .hypothesis
