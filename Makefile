# `make` lists what there is to do. Everything runs in .venv, which `make setup` makes and keeps up to date.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
BENCH := $(sort $(wildcard bench/*.py))
VIEW := build/typeview
KEEP ?=

.PHONY: help setup demo test test-deep style fix typecheck bench docs clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with all that is needed (again where pyproject.toml or constraints.txt changed)
	@PYTHON="$(PYTHON)" .ci/setup

demo: setup ## run the main job on a small made-up family, showing each command (KEEP=DIR leaves the folder)
	@$(BIN)/python bench/demo.py $(if $(KEEP),--keep "$(KEEP)")

test: setup ## run the tests (ARGS='-k name' goes to pytest)
	$(BIN)/pytest -n 2 $(ARGS)

test-deep: setup ## run the tests with far more examples, kills and fuzzing (minutes)
	MP_TEST_DEPTH=deep $(BIN)/pytest -n 2 $(ARGS)

style: setup ## check lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: setup ## repair lint and format where that can be done by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup ## check types, strictly
	@mkdir -p $(VIEW)/mergepipe
	@for folder in store merge cli; do ln -sfn "$(CURDIR)/$$folder" $(VIEW)/mergepipe/$$folder; done
	MYPYPATH=$(VIEW) $(BIN)/mypy -p mergepipe
	MYPYPATH=$(VIEW):bench $(BIN)/mypy $(BENCH)

bench: setup ## time ingest, export and quick commands on a small family (the full size: python bench/ingest.py)
	$(BIN)/python bench/ingest.py --preset small --experts 4 --rounds 3
	$(BIN)/python bench/export.py --preset small --experts 1 --rounds 3
	$(BIN)/python bench/latency.py

docs: setup ## write docs/cli.md from the commands' own help, and list the documentation
	@$(BIN)/python docs/generate.py
	@for page in README.md docs/*.md docs/adr/*.md; do \
		if [ -e "$$page" ]; then printf '  %-28s %s\n' "$$page" "$$(sed -n 's/^# //p' "$$page" | head -n 1)"; fi; \
	done

clean: ## remove what was built and cached; .venv stays
	rm -rf build bench/out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
