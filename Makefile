# Every target sets up .venv first, from constraints.txt, and uses nothing outside it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test check links bench torture clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The whole pipeline on the packaged text; what is done already is not done again.
demo: setup
	$(BIN)/mdeberta demo

# All tests but the torture.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Style, types, import directions and the quick tests.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

# Line numbers of the documentation's links into code, after code has moved.
links: setup
	$(BIN)/python tests/test_docs.py

# Us and the peers in turn, stage by stage. The loader's peers want older packages than ours, so they have their own.
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	test -x .venv/peers/bin/python || $(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet --disable-pip-version-check mosaicml-streaming==0.13.0 litdata==0.2.76
	for script in $(filter-out benchmarks/turns.py benchmarks/gpu.py benchmarks/%peers.py benchmarks/loader_peer.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Hours of kills, damage and fuzzing.
torture: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,torture]'
	$(BIN)/python -m pytest tests/torture --timeout 86400

clean:
	rm -rf .venv runs build *.egg-info
