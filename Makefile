# On a fresh machine with python3 (3.11 or newer) and make:
#   make demo    sets up .venv and shows the library at work on the embedded model; no network once set up
#   make test    sets up .venv with the developer's tools and runs every check; `make test-all` adds the slow tests
#   make test-latest, make test-oldest    the main things, with the newest versions, with the oldest that setup.cfg allows
#
# What may be set:  make demo PYTHON=python3.12 TORCH='torch' VENV=/somewhere/venv CONSTRAINTS=
PYTHON ?= python3
VENV ?= .venv
# The version that the project is tested on; any torch>=2.6 can be put in its place. Already there when the package
# is installed, so that pip looks for no other.
TORCH ?= torch==2.13.0
# The versions that the project is tested on; empty for whatever pip takes from the ranges in setup.cfg.
CONSTRAINTS ?= constraints.txt
PYTEST_FLAGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# One thread a test process: two processes on two cores already keep both busy.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-latest test-oldest constraints quality style docs clean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

$(VENV)/.installed: setup.cfg $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/diffusers-erasure demo

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# The quick checks first and one after the other, also under `make -j`; pytest's summary comes last.
test: $(VENV)/.installed-dev
	$(MAKE) quality
	$(MAKE) docs
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'not slow'

test-all: $(VENV)/.installed-dev
	$(MAKE) quality
	$(MAKE) docs
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_FLAGS)

# In environments of their own, made anew: of everything but torch the newest, or the floors of setup.cfg.
test-latest test-oldest: test-%:
	rm -rf $(VENV)-$*
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet '$(TORCH)'
	$(PYTHON) tools/requirements.py $* > $(VENV)-$*/requirements.txt
	$(VENV)-$*/bin/python -m pip install --quiet --requirement $(VENV)-$*/requirements.txt
	$(VENV)-$*/bin/python -m pip install --quiet --no-deps --editable .
	$(VENV)-$*/bin/python -m pip list
	$(VENV)-$*/bin/python tools/unserved.py
	$(ONE_THREAD) $(VENV)-$*/bin/python -m pytest tests/test_smoke.py

# The newest versions that the ranges in setup.cfg allow; `make test` then says whether they are good.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet '$(TORCH)'
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]'
	echo '# The tested versions, beside torch (see the Makefile). Written by `make constraints`.' > build/constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable | grep -v '^torch\b' >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean:
	rm -rf $(VENV) $(VENV)-latest $(VENV)-oldest build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf .coverage .coverage.* *.egg-info
	find benchmarks diffusers_erasure diffusers_erasure_cli hub_cards tests tools docs -name __pycache__ -type d -prune -exec rm -rf {} +
