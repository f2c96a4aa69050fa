# `make run` and `make test` set up what they need (tools/setup.sh) and are quick to repeat.
VENV ?= .venv
PYTHON_IN = $(VENV)/bin/python
ARGS ?=

.PHONY: help setup run test figures docs bench clean

help:
	@echo "make run       measure the paper's experiments here, draw the figures, judge the claims (about twenty minutes)"
	@echo "make test      run the tests"
	@echo "make setup     only set up $(VENV) and build the engine"
	@echo "make figures   draw the figures again from the records in results/"
	@echo "make docs      build the guides as a site in build/site"
	@echo "make bench     time the engine's parts at this commit (asv), into results/asv"
	@echo "make clean     remove what was built: $(VENV), build/, .asv/"
	@echo 'options go into ARGS:   make run ARGS="--tier smoke"   make test ARGS="-k plan"'
	@echo "PYTHON=... names the interpreter, CXX=... the compiler, ZNN_TORCH=no does without PyTorch"

setup:
	@ZNN_VENV=$(VENV) sh tools/setup.sh $(if $(filter test,$(MAKECMDGOALS)),test)

run: setup
	$(PYTHON_IN) experiments/run_all.py $(ARGS)

# Tests need answers, not speed: FFTW plans without measuring, and nothing is kept in the user's cache.
test: setup
	ZNN_FFTW_RIGOUR=$${ZNN_FFTW_RIGOUR:-estimate} ZNN_CACHE=$${ZNN_CACHE:-$(CURDIR)/.cache/tests} \
	    $(PYTHON_IN) -m pytest $(ARGS)

figures: setup
	$(PYTHON_IN) paper_figs/build.py

docs: setup
	$(PYTHON_IN) -m mkdocs build --strict --site-dir build/site

bench: setup
	$(VENV)/bin/asv machine --yes
	$(VENV)/bin/asv run --python=same --set-commit-hash HEAD $(ARGS)

clean:
	rm -rf $(VENV) build .asv .cache
