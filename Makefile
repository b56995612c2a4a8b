# On a fresh machine with python3 (3.11 or newer) and make:
#   make demo    sets up .venv and shows the library at work on the embedded model; no network once set up
#   make test    sets up .venv with the developer's tools and runs every check; `make test-all` adds the slow tests
#
# What may be set:  make demo PYTHON=python3.12 TORCH='torch' VENV=/somewhere/venv
PYTHON ?= python3
VENV ?= .venv
# The version that the project is tested on; any torch>=2.6 can be put in its place. Already there when the package
# is installed, so that pip looks for no other.
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
# One thread a test process: two processes on two cores already keep both busy.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-all quality style docs clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

$(VENV)/.installed: setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/diffusers-erasure demo

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy diffusers_erasure

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# The quick checks first and one after the other, also under `make -j`; pytest's summary comes last.
test: $(VENV)/.installed-dev
	$(MAKE) quality
	$(MAKE) docs
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'not slow'

test-all: $(VENV)/.installed-dev
	$(MAKE) quality
	$(MAKE) docs
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_FLAGS)

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info
	find diffusers_erasure hub_cards tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
