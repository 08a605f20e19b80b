# make demo | test | test-all | lint | bench | clean. All that is installed goes into .venv, all that is made into .demo.

PYTHON ?= python3
JOBS ?= 2
MODELS ?= $(or $(PORTER_MODELS),../shared/models)
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := OMP_NUM_THREADS=1 TVM_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS)

.PHONY: demo test test-all lint bench clean

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" samples/01-first-port/run.sh .demo

test: $(INSTALLED)
	$(PYTEST)

test-all: $(INSTALLED)
	$(PYTEST) -m ''

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench: $(INSTALLED)
	$(BIN)/python benchmarks/accuracy.py --models $(MODELS)
	$(BIN)/python benchmarks/casting.py
	$(BIN)/python benchmarks/estimate.py

clean:
	rm -rf .venv .demo build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A venv that is there is used again; it is installed into when the dependencies change.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[export,test]'
	touch $@
