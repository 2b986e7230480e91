# Two targets do everything: `make table2` and `make test`. Both install what they need into .venv
# from the locked, hashed versions. Another Python: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LOCK = .ci/requirements.lock
INSTALLED = $(VENV)/.installed

.PHONY: table2 test slow peers gpu docs install lint lock readme audit clean

# Table 2 of the paper from nothing: sweep, train, report, into runs/table2/, which git ignores; the
# published evidence in results/ stays as it is
table2: $(INSTALLED)
	$(BIN)/unitnorm reproduce --fresh

# Lint, types and all tests
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What takes minutes: every update in each test of updates, thirty kills at any moment
slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The updates and the benchmark's loops beside those of geoopt, pymanopt and PyTorch
peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .ci/peers.lock
	$(BIN)/python -m pytest -rs tests/test_peers.py tests/test_bench.py

# What a GPU is to measure and train, 8 minutes a call, into runs/gpu/DEVICE; needs no network, and
# takes $(PYTHON) where there is no $(VENV):  make gpu PYTHON=python3 GPU='--data fashion=FOLDER'
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) .ci/gpu.py $(GPU)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of .docs/, with warnings as errors
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -q -b html .docs build/docs

install: $(INSTALLED)

$(INSTALLED): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# New versions into the lock file; needs uv
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate --upgrade -o $(LOCK)

# The READMEs' tables again, from results/, and the drawings of the docs
readme: $(INSTALLED)
	$(BIN)/python .ci/readme.py
	$(BIN)/python .docs/pictures.py

# Secrets in the tree, and known vulnerabilities of the locked versions; the latter asks PyPI's JSON
# service, and fails where that does not know a package rather than count it as sound
audit: $(INSTALLED)
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook \
		--exclude-files '\.ci/requirements\.lock|results/' --exclude-lines '[0-9a-f]{64}'
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r $(LOCK)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
