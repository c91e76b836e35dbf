# Everything from a clone with Python 3.11+ and git. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-faults test-gpu test-oldest test-readers fuzz check fmt bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## install, quantize the embedded model to 4 bits, show what it cost
	$(BIN)/llmshrink quantize --bits 4 --output out/demo --overwrite

test: $(STAMP) ## the default tests: offline, under ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP) ## tests that take minutes: every method of every family, a built wheel
	$(BIN)/python -m pytest -m slow

test-faults: $(STAMP) ## kills, failing disks and memory at every step of every method
	$(BIN)/python -m pytest -m faults

test-gpu: $(STAMP) ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-oldest: ## the default tests with the oldest releases that pyproject.toml allows (torch: the pinned one)
	test -x .venv-oldest/bin/uv || ($(PYTHON) -m venv .venv-oldest && .venv-oldest/bin/pip install --quiet uv)
	grep '^torch==' constraints.txt > .venv-oldest/torch.txt
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
	  --constraint .venv-oldest/torch.txt --editable . "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100"
	.venv-oldest/bin/python -m pytest -o filterwarnings=default -p no:cacheprovider

.venv-readers/.installed: tests/readers/constraints.txt
	test -x .venv-readers/bin/python || $(PYTHON) -m venv .venv-readers
	.venv-readers/bin/python -m pip install --quiet --disable-pip-version-check -c $< optimum gptqmodel
	@touch $@

.venv-llamacpp/.installed: tests/readers/llamacpp.txt
	test -x .venv-llamacpp/bin/python || $(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-readers: $(STAMP) .venv-readers/.installed .venv-llamacpp/.installed ## gptq and awq in optimum and gptqmodel (6 GB), gguf in llama.cpp; minutes
	LLMSHRINK_READERS_PYTHON=$(CURDIR)/.venv-readers/bin/python \
	LLMSHRINK_LLAMACPP_PYTHON=$(CURDIR)/.venv-llamacpp/bin/python $(BIN)/python -m pytest -m readers

fuzz: $(STAMP) ## fuzz the readers of foreign files for SECONDS (60) each; TARGETS names some of them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	PYTHONPATH=tests:. $(BIN)/python -m fuzz.run --seconds $(or $(SECONDS),60) $(TARGETS)

check: $(STAMP) ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(STAMP) ## format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the benches of bench/results.md that need nothing but this project
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.startup

clean: ## remove what these targets made
	rm -rf .venv .venv-oldest .venv-readers .venv-llamacpp build dist out/demo out/fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
