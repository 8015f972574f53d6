# make demo and make test work from a bare clone with python3 and pip.
PYTHON ?= python3
LOCK := constraints.txt
# torch is installed first and by its exact version: a range would take the newest CUDA build, which is several GB.
TORCH ?= $(shell grep '^torch==' $(LOCK))
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := -n 2 --dist loadfile --no-loadscope-reorder
# pip does not lock what a package is built with, so setuptools is installed with torch and builds without isolation.
BACKEND := 'setuptools>=77.0.3'
HERE := --no-build-isolation -e '.[dev]'
# On other versions than the locked ones the faster half is run, and deprecations of other libraries pass.
OTHER_VERSIONS := -p tests.foreign_deprecations -m 'not slow'

.PHONY: venv demo demo-real test real-models coverage benchmarks lock test-latest test-oldest
venv: $(STAMP)

$(STAMP): pyproject.toml setup.py $(LOCK)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c $(LOCK) $(TORCH) $(BACKEND)
	$(BIN)/python -m pip install -c $(LOCK) $(HERE)
	touch $@

demo: $(STAMP)
	$(BIN)/molehunt demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest $(PYTEST)

# Fetches the real models that the tests marked `real` run on (420 MB, into the user's cache) and says where they are.
# Some of them: make real-models MODELS=SmolLM2-135M-Instruct
MODELS ?=
real-models: $(STAMP)
	$(BIN)/python tools/real_models.py $(MODELS)

# The demo in a real model, SmolLM2-135M-Instruct: about 20 minutes on two cores.
demo-real: $(STAMP)
	$(BIN)/python tools/real_models.py SmolLM2-135M-Instruct
	$(BIN)/molehunt demo --out demo-real --base "$$($(BIN)/python -c \
	  'from molehunt.run.cache_folders import SMOLLM2, real_model; print(real_model(SMOLLM2))')"

# The same tests traced; tracing nearly doubles their time.
coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Every kind of wrong input on the command line, of which `make test` tries a sample. The whole takes hours: every 20th
# input is EVERY=20.
EVERY ?= 1
contract: $(STAMP)
	$(BIN)/python -W ignore -m tests.contract --every $(EVERY)

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/run.py

# Writes the newest releases into constraints.txt; run make test on them before they are committed.
# torch stays where it is unless it is named: make lock TORCH=torch==2.14.1
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install $(TORCH) $(BACKEND)
	.venv-lock/bin/python -m pip install $(HERE)
	.venv-lock/bin/python tools/lock.py
	rm -rf .venv-lock

# The newest releases of everything but torch, which stays at the lock's unless it is named, as above.
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install $(TORCH) $(BACKEND)
	.venv-latest/bin/python -m pip install $(HERE)
	.venv-latest/bin/python -m pytest $(PYTEST) $(OTHER_VERSIONS); code=$$?; .venv-latest/bin/molehunt doctor; exit $$code

# The lower bounds of pyproject.toml; what those libraries need in turn is the newest that they allow.
# torch alone is the lock's here, since older releases may be CUDA builds of several GB. Its own lower bound is tested by
# hand: make test-oldest OLDEST_TORCH=torch==2.8.0
OLDEST_TORCH ?= $(TORCH)
test-oldest: $(STAMP)
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/python tools/lower_bounds.py | grep -v '^torch==' > .venv-oldest/bounds.txt
	.venv-oldest/bin/python -m pip install -c .venv-oldest/bounds.txt $(OLDEST_TORCH) $(BACKEND)
	.venv-oldest/bin/python -m pip install -c .venv-oldest/bounds.txt $(HERE)
	.venv-oldest/bin/python -m pytest $(PYTEST) $(OTHER_VERSIONS); code=$$?; .venv-oldest/bin/molehunt doctor; exit $$code
