# `make` lists what there is to do. Everything runs in .venv, which `make setup` makes and keeps up to date.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
BENCH := $(sort $(wildcard bench/*.py))
VIEW := build/typeview
KEEP ?=
LEAST := 95
COVERING := tests/store tests/cli tests/trust tests/docs --ignore tests/cli/test_startup.py
COMPILED := tests/store/test_kernels.py tests/store/test_previews.py
PLAIN := planes or differences or of_bfloat16 or usual_delta or lattice or any_part or near_the_smallest or sums_follow

.PHONY: help setup demo test test-deep coverage style fix typecheck bench docs clean
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

coverage: setup ## measure what the tests run of store/, lines and branches, in child processes too (15 minutes)
	@rm -rf build/coverage && mkdir -p build/coverage
	@# Measuring takes time, and time limits of tests may be too short for it: what fails here, `make test` judges.
	-$(BIN)/coverage run -m pytest -n 2 $(COVERING)
	@# Compiled loops cannot be seen into, so a few of their tests run once more as plain Python.
	NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest -W ignore -k "$(PLAIN)" $(COMPILED)
	@# A process that was killed may leave half a file, which is left out with a warning.
	@$(BIN)/coverage combine -q
	@rm -f build/coverage/data.*
	@$(BIN)/coverage json -q
	@$(BIN)/coverage report
	@$(BIN)/python -c 'import json, sys; total = json.load(open("build/coverage/report.json"))["totals"]; \
		found = total["percent_statements_covered"], total["percent_branches_covered"]; \
		print("lines %.1f%%, branches %.1f%%" % found); sys.exit(min(found) < $(LEAST) and "less than $(LEAST)%")'

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
