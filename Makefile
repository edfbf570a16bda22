# make demo, make test, make matrix, make documents, make style, make quality, make dist, make upstream: each makes its
# own environment in .venv first.
# make test-lowest runs tests with the oldest versions that setup.cfg allows, in .venv-lowest.
# PYTHON chooses the interpreter: make demo PYTHON=python3.12
# PIP_TORCH_OPTIONS is given to pip where it installs torch. Without a GPU this saves gigabytes on Linux:
#   make demo PIP_TORCH_OPTIONS="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_TORCH_OPTIONS ?=
LOWEST_TESTS ?= tests/engine tests/training/test_train_scripts.py tests/training/test_prompts.py \
	tests/judging/test_figures.py tests/judging/test_evaluate.py
SOURCES = pipelines training demo tests benchmarks docs upstream setup.py

.PHONY: demo test test-lowest matrix documents style quality dist upstream venv

demo: .venv/.demo
	.venv/bin/python demo/run.py

test: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

# The engine, a training with each script, and what uses the packages of the extra training.
test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 $(LOWEST_TESTS)

matrix: .venv/.installed
	.venv/bin/python tests/support/matrix.py --write

# Every table and figure of README.md and docs/ that is made from results or from the code.
documents: .venv/.installed
	.venv/bin/python benchmarks/documents.py --write
	.venv/bin/python docs/methods_table.py --write
	.venv/bin/python docs/rewards_table.py --write
	.venv/bin/python docs/how_it_works.py

upstream: .venv/.installed
	.venv/bin/python upstream/check.py $(DIFFUSERS)

style: .venv/.installed
	.venv/bin/ruff check --fix $(wildcard $(SOURCES))
	.venv/bin/ruff format $(wildcard $(SOURCES))

quality: .venv/.installed
	.venv/bin/ruff check $(wildcard $(SOURCES))
	.venv/bin/ruff format --check $(wildcard $(SOURCES))

# What PyPI gets, in dist/.
dist: .venv/.installed
	rm -rf dist
	.venv/bin/python -m build --no-isolation
	.venv/bin/python -m twine check --strict dist/*

venv: .venv/.installed

# torch comes first and alone: later installs then find it there and do not choose another build of it.
.venv/.demo: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python 3.11 or later expected, got {v[0]}.{v[1]}: choose one with PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt $(PIP_TORCH_OPTIONS) torch
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

.venv/.installed: .venv/.demo
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[test,dev]"
	touch $@

.venv-lowest/.installed: setup.cfg constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt $(PIP_TORCH_OPTIONS) torch
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[training]" pytest pytest-xdist
	touch $@
