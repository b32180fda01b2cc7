# Two commands: `make run` makes the report of the embedded demo (or of CONFIG=...), `make test` runs the tests.
PYTHON ?= python3
CONFIG ?= config.yaml
CORES ?= all
BIN := .venv/bin

.PHONY: run test check benchmark demo clean

run: .venv/installed
	$(BIN)/python -m pipeline.config config.yaml $(CONFIG)
	$(BIN)/python -m snakemake --cores $(CORES) --configfile $(CONFIG)

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/python -m snakemake --lint
	$(BIN)/python -m snakemake --dry-run --quiet all

# The engine against the plain way, run_evals and the hardware's limit, as ratios; SMALL=--small only sees that it runs.
benchmark: .venv/installed
	$(BIN)/python -m benchmarks.run $(SMALL)

# Rebuilds every asset of demo/ from nothing; see demo/README.md.
demo: .venv/installed
	$(BIN)/python demo/build.py

clean:
	rm -rf results .snakemake

.venv/installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $@
