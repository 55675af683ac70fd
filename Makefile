# Everything below sets itself up in $(VENV) and touches no other environment.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
JOBS   ?= auto
KILLS  ?= 50
MINUTES ?= 30

BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile every file of every package, which takes a minute.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help demo test test-all test-ptx mutants fuzz faults lint format bench docs dist clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One stamp file per set of extras. The first pip call of an environment is the slow one.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/$(INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/.lint: pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/$(INSTALL) -e '.[test,lint]'
	@touch $@ $(VENV)/.test $(VENV)/.run

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/$(INSTALL) -e '.[docs]'
	@touch $@

demo: $(VENV)/.run  ## train a small GPT twice, with the eager loop and with ours (options: ARGS="--steps 50")
	$(BIN)/fusedopt demo $(ARGS)

test: $(VENV)/.test  ## run the tests, but for those marked as slow (options: ARGS="-k adamw")
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not slow" $(ARGS)

test-all: $(VENV)/.lint $(VENV)/.docs  ## run every test but those of test-ptx: the slow ones, kernels for every architecture, the site in a browser
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

test-ptx: $(VENV)/.test  ## run what Triton compiles for sm_90 on the CPU, and compare it with eager steps and recorded runs
	$(BIN)/python -m pytest -q -n $(JOBS) tests/ptx $(ARGS)

mutants: $(VENV)/.test  ## spoil compiled instructions one by one, and count what those tests notice (options: ARGS="--number 50")
	PYTHONPATH=.:kernels:tests $(BIN)/python -m ptx.mutants $(ARGS)

faults: $(VENV)/.test  ## kill the demo KILLS times at random moments, and resume it; then run the tests of faults
	PYTHONPATH=tests $(BIN)/python tests/killed_demo.py $(KILLS)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS) tests/test_full_disk.py tests/test_out_of_memory.py tests/test_malformed_checkpoints.py

fuzz: $(VENV)/.test  ## random models, options and events for MINUTES=30; a failure is found again (options: ARGS="--seed 1")
	PYTHONPATH=.:kernels:tests $(BIN)/python -m fuzz --minutes $(MINUTES) $(ARGS)

lint: $(VENV)/.lint  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint  ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test  ## what fits this machine in two minutes
	$(BIN)/python -m perf.bench $(ARGS)

# The wheel is built from the sdist. Where torch brings triton along, it is taken out for the first try.
dist: $(VENV)/.lint  ## build sdist and wheel, and try the wheel in an empty environment, without triton and with it
	rm -rf dist $(VENV)-dist
	$(BIN)/$(INSTALL) -e '.[dist]'
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/$(INSTALL) dist/*.whl
	$(VENV)-dist/bin/pip uninstall --quiet --yes triton
	$(VENV)-dist/bin/python tests/smoke.py
	cd $(VENV)-dist && $(abspath $(BIN)/mypy) --strict --config-file= --python-executable bin/python $(abspath tests/typed_program.py)
	$(VENV)-dist/bin/$(INSTALL) "$$(echo dist/*.whl)[triton]"
	TRITON_INTERPRET=1 $(VENV)-dist/bin/python tests/smoke.py --triton

docs: $(VENV)/.docs  ## build the site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-dist build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
