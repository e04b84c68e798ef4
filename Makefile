# make demo      installs what the demo needs and runs it
# make test      installs what the tests need, lints, checks types, runs the tests
# make test-all  the same and the slow tests
# make docs      installs what the pictures need and writes docs/patterns.md and docs/patterns/
# make systems   installs what the demo needs, scores every text system on its task and writes that part of docs/patterns.md; KEYS="star etc"
#                scores the rows of these alone
# make bench     installs what the benchmark needs and runs it; MODE=full for all of it, DEVICE=cuda on a GPU
#
# TORCH_INDEX=<address> takes torch, at the version of constraints.txt, from that package index first: the way to a CPU build on
# machines where the pin alone would fetch the CUDA packages.

.DELETE_ON_ERROR:
.PHONY: demo docs systems bench test test-all lint

TORCH_INDEX ?=
TEST_EXTRAS := dev,demo,bench,recipes,peft,notebooks
MODE ?= quick
KEYS ?=
DEVICE ?= cpu

PYTHON := .venv/bin/python
# Bytecode is written at the first import, for what is imported: compiling all that is installed takes half a minute longer.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PYTHON) -m pip install --disable-pip-version-check --no-compile -c constraints.txt

# Models come from installed packages or are made in the tests: nothing here may ask the Hub.
export HF_HUB_OFFLINE := 1

demo: .venv/.installed-demo
	.venv/bin/hf-sparse demo

bench: .venv/.installed-bench
	.venv/bin/hf-sparse bench --mode $(MODE) --device $(DEVICE)

docs: .venv/.installed-plot
	$(PYTHON) -m hf_sparse.gallery

systems: .venv/.installed-demo
	$(PYTHON) -m hf_sparse.demo.systems $(KEYS)

# One process a core, each on one thread.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist worksteal

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "not gpu"

# mypy names a module by its folder, and the folders beside the package install under another one: it gets a tree of links with the
# installed names.
lint: .venv/.installed-$(TEST_EXTRAS)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/typed
	mkdir -p build/typed/hf_sparse
	ln -s "$(CURDIR)"/hf_sparse/* "$(CURDIR)/conversion" "$(CURDIR)/recipes" "$(CURDIR)/benchmarks" build/typed/hf_sparse
	cd build/typed && "$(CURDIR)/$(PYTHON)" -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

# One stamp per set of extras: installing again waits for a change of what is to be installed.
.venv/.installed-%: pyproject.toml constraints.txt | $(PYTHON)
	$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(INSTALL) -e '.[$*]'
	touch $@

# A version manager may offer a python3.11 that does not run: only making the environment tells.
$(PYTHON):
	python3.11 -m venv .venv || { rm -rf .venv; python3 -m venv .venv; }
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "hf-sparse needs Python 3.11 or later")' \
		|| { rm -rf .venv; exit 1; }
