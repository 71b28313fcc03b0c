# One command each. Everything installs itself into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOOKED := .venv-hooked
READY := $(VENV)/.ready
REAL_MODELS := qwen2.5-coder-0.5b-instruct smollm2-135m-instruct
# What the site is made of, each where it lies in the repository, so that one link is right in both.
SITE := docs figures notebooks README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md refusal_mi/data refusal_mi/organism/model
MISSING_MODELS = $(filter-out $(notdir $(wildcard $(REFUSAL_MI_REAL_MODELS)/*)),$(REAL_MODELS))

.PHONY: demo test test-fast test-real test-hooked test-gpu long check notebooks figures docs bench bench-long bench-gpu clean

demo: $(READY)
	$(BIN)/refusal-mi run

# Everything (8 to 11 minutes on 2 cores).
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What is not marked slow, for use while working (under a minute on 2 cores).
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not real and not gpu and not hooked"

# Real chat models (about 16 minutes on 2 cores), in the folder that REFUSAL_MI_REAL_MODELS names.
test-real: $(READY)
	$(if $(MISSING_MODELS),$(error REFUSAL_MI_REAL_MODELS="$(REFUSAL_MI_REAL_MODELS)" names no folder with $(MISSING_MODELS)))
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m real tests/real

# HookedTransformer (TransformerLens 3.9), in an environment of its own (about 3 minutes on 2 cores).
test-hooked: $(HOOKED)/.ready
	OMP_NUM_THREADS=1 $(HOOKED)/bin/python -m pytest -o addopts="-q -rs --strict-markers" -n 2 --dist loadgroup -m hooked tests/hooked

# What needs CUDA, and bitsandbytes (refusal_mi[quantization]).
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu

# What takes too long for every change: 21,000 damaged files in all readers, 40 kills of commands and of workers (10 to 30
# minutes on 2 cores).
long: $(READY)
	REFUSAL_MI_FUZZ=1500 REFUSAL_MI_KILLS=40 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/project/test_fuzz.py tests/run/test_kills.py tests/engine/test_ray.py

# Runs every notebook from top to bottom, and fails where it says something else than the committed one.
notebooks: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python notebooks/refresh.py --check

# Draws every picture in figures/ again, with its numbers; interactive pages go to build/figures/html.
figures: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python figures/make.py

# The site, in site/ (about a minute); a link that leads nowhere fails. `mkdocs serve` then shows changes as they are made.
docs: $(READY)
	rm -rf build/site && mkdir -p build/site/refusal_mi/organism
	$(foreach each,$(SITE),ln -s $(CURDIR)/$(each) build/site/$(each);)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "refusal_mi needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

$(HOOKED)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HOOKED)
	$(HOOKED)/bin/python -m pip install --quiet --upgrade pip
	sed 's/^transformer-lens==.*/transformer-lens==3.9.0/' constraints.txt > $(HOOKED)/constraints.txt
	$(HOOKED)/bin/python -m pip install --quiet -c $(HOOKED)/constraints.txt -e '.[dev]'
	touch $(HOOKED)/.ready

# Every row against the straightforward way (about 15 minutes on 2 cores); the table goes to docs/scaling.md.
bench: $(READY)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.sweep --long-template
	$(if $(REFUSAL_MI_REFERENCE_DATA),$(BIN)/python -m benchmarks.sweep --splits $(REFUSAL_MI_REFERENCE_DATA)/splits)
	$(BIN)/python -m benchmarks.staged
	$(BIN)/python -m benchmarks.staged_draws
	$(BIN)/python -m benchmarks.responses
	$(BIN)/python -m benchmarks.responses --model 110m
	$(BIN)/python -m benchmarks.means
	$(BIN)/python -m benchmarks.means --model 110m
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.generation --model 110m
	$(BIN)/python -m benchmarks.losses
	$(BIN)/python -m benchmarks.losses --model 110m
	$(BIN)/python -m benchmarks.checks
	$(BIN)/python -m benchmarks.checks --model 110m
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python benchmarks/export_memory.py
	$(BIN)/python -m benchmarks.table

# On a CUDA GPU, in bfloat16 but for the embedded model (about 6 minutes on an H100).
bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.sweep --device cuda
	$(BIN)/python -m benchmarks.staged --device cuda
	$(BIN)/python -m benchmarks.generation --device cuda --model 110m
	$(BIN)/python -m benchmarks.sweep --device cuda --model 8b --pairs 1
	$(BIN)/python -m benchmarks.generation --device cuda --model 8b
	$(BIN)/python -m benchmarks.losses --device cuda --model 8b
	$(BIN)/python -m benchmarks.means --device cuda --model 8b
	$(BIN)/python -m benchmarks.table

# The rows of the search at 110M, where the published sweep alone takes minutes.
bench-long: $(READY)
	$(BIN)/python -m benchmarks.sweep --model 110m
	$(BIN)/python -m benchmarks.sweep --model 110m --long-template --positions 1
	$(BIN)/python -m benchmarks.staged --model 110m
	$(BIN)/python -m benchmarks.table

clean:
	rm -rf $(VENV) build dist site *.egg-info
