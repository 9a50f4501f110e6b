# make quickstart   set up and run the main job on the embedded data set (no GPU, no downloads of data)
# make test         set up and run every test
# make test-fast    set up and run the tests that take no seconds each, in at most 90 seconds
# make test-pretend set up and run the tests that need a GPU on a pretended one (5 minutes)
# make campaign     set up and try every fault: broken files, full disks, signals (15 minutes)
# make lint         set up, then ruff and mypy
# make setup        only set up: .venv with everything in it
# make format       let ruff format and mend what it can
# make docs         set up and build the guide into site/
# make bench        time a training step against the loop in common use (6 minutes)
# make clean        remove what setup made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadgroup

.PHONY: setup quickstart test test-fast test-pretend campaign lint format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 14) else "error: Python 3.10 to 3.14 is needed, " + sys.executable + " is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

quickstart: setup
	$(BIN)/python tools/quickstart.py

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow and not gpu"

test-pretend: setup
	MDISTILL_PRETEND_CUDA=1 $(PYTEST) -m gpu

campaign: setup
	$(BIN)/python -m tests.faults.campaign

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

bench: setup
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) site *.egg-info
