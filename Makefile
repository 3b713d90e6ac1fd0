# `make demo` and `make test` are all a fresh machine needs: Python 3.11 or newer and make.
PYTHON ?= python3
# Extra words for pip, for instance an index of CPU builds of torch.
PIP_ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c .ci/constraints.txt

.PHONY: demo test test-all docs check bench gpu antibody antibody-loops lint clean

demo: .venv/demo
	$(BIN)/discdiff demo --out demo.png
	@echo 'Before these commands: source .venv/bin/activate'

# The linter and the site after the tests: where they find something, what the tests say is there to be read.
test: .venv/test
	$(BIN)/python -m pytest -n 2 -q --durations 20 -m "not slow" $(PYTEST_ARGS)
	$(MAKE) lint
	$(MAKE) docs

# The slow tests too: an hour.
test-all: .venv/test
	$(BIN)/python -m pytest -n 2 -q --durations 40 -m "not site" $(PYTEST_ARGS)
	$(MAKE) lint
	$(MAKE) docs

# The site in build/site/html, a minute: every warning is an error, and tests ask its search and look at its pages.
docs: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python docs/website/make_site.py build/site
	SITE=build/site/html $(BIN)/python -m pytest -q -m site tests/test_site.py

# Before a commit: linter, types and the quick tests of every part, in two minutes.
QUICK := assets bad_logits bench block_causal block_losses certain chain choices controls diffusion_transformers \
	dit doctor doors errors evodiff fairseq files fit frames fuzz gemma generation gibbs head layout levels \
	library listening load md4 operator oracles plots prediction probe process program purity int8 recorded \
	reprs rest save scan schedule schedulers shown suggestions trajectory transformer unmasking
check: lint
	$(BIN)/python -m pytest -n 2 -q -m "not slow" $(foreach name,$(QUICK),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

# The figures of docs/bench.md, other packages' steps among them, and the ratios that `discdiff bench --check` knows.
bench: .venv/test
	$(BIN)/python -m pytest -q tests/command/test_bench.py --benchmark-enable --benchmark-only -p no:cacheprovider
	$(BIN)/python docs/bench.py

# What only a GPU can tell, in minutes: on a machine whose own Python has CUDA builds of torch and triton (GPU_PYTHON).
GPU_PYTHON ?= $(PYTHON)
GPU_OUT ?= build/gpu
gpu:
	TRITON_INTERPRET=0 PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m pytest -q -p no:cacheprovider -o filterwarnings= \
		tests/kernels/test_gpu.py tests/kernels/test_gpu_runs.py
	TRITON_INTERPRET=0 PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) docs/gpu.py $(GPU_OUT)

# Antibody domains by a network that somebody else trained, and the table of docs/antibodies.md: a quarter of an hour.
# Then third loops that meet conditions, for the tables of docs/steering.md: twenty minutes on two cores.
antibody: .venv/antibody
	$(BIN)/python docs/antibodies.py
	$(MAKE) antibody-loops

antibody-loops: .venv/antibody
	$(BIN)/python docs/steering/third_loops.py
	$(BIN)/python docs/steering/page.py third_loops

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: pyproject.toml .ci/constraints.txt | .venv/python
	$(INSTALL) -e '.[demo,hf,steer]'
	touch $@

.venv/antibody: pyproject.toml .ci/constraints.txt | .venv/python
	$(INSTALL) -e '.[antibody,demo,steer]'
	touch $@

# sapiens is read and never imported: what it asks for does not go with a torch of today. An index without it costs two
# tests, one without pyright another: they say that they were skipped.
.venv/test: pyproject.toml .ci/constraints.txt | .venv/python
	$(INSTALL) -e '.[test]'
	-$(INSTALL) --no-deps sapiens==1.0.5
	-$(INSTALL) "pyright[nodejs]==1.1.414"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
