# Everything runs inside .venv, which the first target you call sets up. `make` alone lists the targets.

PYTHON ?= python3
BIN    := .venv/bin
PY     := $(BIN)/python
READY  := .venv/.vitq-ready
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check golden bench zoo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install vitq with its development tools (the other targets do this too)

$(READY): pyproject.toml
	@PYTHON='$(PYTHON)' sh tools/setup.sh
	@touch $@

demo: $(READY) ## run the main job on the embedded models
	@$(BIN)/vitq demo

test: check ## lint, types and every test
# One thread per worker: more would make the workers fight for the same cores.
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(READY) ## formatting, lint and types, without the tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

golden: $(READY) ## write the golden files of all recipes again, and print what changed
	@$(PY) tests/golden/write.py

bench: $(READY) ## measure again what results/*.csv holds (long)
	@$(PY) benchmarks/run.py

zoo: $(READY) ## train the embedded models again (long; DATA=folder of Fashion-MNIST's idx files)
	@$(PY) tools/train_zoo.py $(if $(DATA),--data '$(DATA)')

clean: ## remove caches and build output (.venv stays; delete it by hand to start afresh)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out
	@find . -path ./.venv -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
