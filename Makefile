# Everything a contributor runs. A target first makes `.venv` when there is none, or when what it is made from has changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lowest machines export readme docs bundle

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs

step = printf '\n== %s\n'
took = && printf '== took %d min %02d s\n' $$((SECONDS/60)) $$((SECONDS%60))

help: ## Print these targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(READY) ## Score, compare, rank and steer with the embedded models; writes demo/
	@$(BIN)/llava_reward_demo

test: export HF_HUB_OFFLINE = 1
test: export PYTHONUNBUFFERED = 1
test: $(READY) ## Check that notebooks and package agree, run every notebook, then all tests
	@$(step) '1/3 notebooks, package and README agree'
	@$(BIN)/python -m pytest -q --tb=short tests/test_project.py $(took)
	@$(step) '2/3 every notebook runs from top to bottom'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing $(took)
	@$(step) '3/3 tests, the wheel in a fresh environment among them'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --ignore=tests/test_project.py tests

lowest: ## Install the lowest versions of settings.ini in .venv-lowest and test with them (PYTHON=python3.11; minutes)
	@$(PYTHON) tools/lowest.py

machines: $(READY) ## Run notebooks and numeric tests as other CPUs compute them, on 1 and 2 threads (hours)
	@$(BIN)/python tools/machines.py

export: $(READY) ## Write the package from the notebooks, then clean the notebooks
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && echo 'llava_reward_nb/ now is what nbs/ says'

readme: $(READY) ## Write README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)/.ready ## Build the site from notebooks and source in _site/, without the network, and check its links
	@$(DOCS)/bin/mkdocs build --strict --quiet && $(DOCS)/bin/python tools/docs.py $(took)

bundle: export OMP_NUM_THREADS = 1
bundle: export MALLOC_MMAP_THRESHOLD_ = 1000000000
bundle: export MALLOC_TRIM_THRESHOLD_ = 1000000000
bundle: $(READY) ## Retrain the embedded models (hours; when interrupted, run it again and it goes on)
	@$(BIN)/python tools/bundle.py $(SHARE) $(took)

needs_311 = $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("The versions in constraints.txt need \
	Python 3.11 or newer; $(PYTHON) is %d.%d. Name another, such as: make PYTHON=python3.11" % v[:2])'

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(needs_311)
	@$(step) 'preparing $(VENV) (the first time takes minutes)'
	@$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]' && touch $@ $(took)

# The site needs neither the package nor torch: it reads source. So its tools live apart.
$(DOCS)/.ready: settings.ini constraints.txt
	@$(needs_311)
	@$(step) 'preparing $(DOCS)'
	@$(PYTHON) -m venv $(DOCS) && $(DOCS)/bin/python -m pip install -qq -c constraints.txt \
	  $$(sed -n 's/^docs_requirements = //p' settings.ini) && touch $@ $(took)
