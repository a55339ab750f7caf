# make demo       train, export and look: the paper's argument in miniature, into demo_output/
# make test       ruff, mypy and the tests a developer waits for
# make evidence   docs/evidence.md, from the stored runs
# make docs       the site, from docs/ into site/
# make test-all   everything: also the slow tests, the test-suite of transformers, the lowest supported versions
PYTHON ?= python3
# The floor is tested on the lowest Python at hand, because that is where it will be used.
FLOOR_PYTHON ?= $(shell for p in python3.10 python3.11 python3.12 $(PYTHON); do \
	$$p -c '' 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2

VENV := .venv
FLOOR := .venv-floor
BIN := $(VENV)/bin
# loadfile: the tests of one file share their fixtures in one worker, and files begin in the order of tests/conftest.py.
# One thread each: the workers share the cores.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test test-slow test-official test-floor: export OMP_NUM_THREADS = 1

.PHONY: demo evidence docs test test-all test-slow test-official test-floor lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m examples.digits

evidence: $(VENV)/.installed
	$(BIN)/python -m experiments.locality.report

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint
	$(BIN)/python -m pytest -q $(PARALLEL) --durations=20

test-all: test test-slow test-official test-floor

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(PARALLEL) -m slow

test-official: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(PARALLEL) tests/official

test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest -q $(PARALLEL)

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# torch and torchvision are resolved together: each torchvision belongs to one torch.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(FLOOR)/.installed: pyproject.toml tests/floor.txt
	test -x $(FLOOR)/bin/python || $(FLOOR_PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --upgrade pip
	$(FLOOR)/bin/python -m pip install --quiet --constraint tests/floor.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR) .cache build demo_output site
