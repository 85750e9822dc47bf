# make setup | demo | test | check | bench. Everything is installed into .venv; only Python 3.11 and make are needed.
PYTHON ?= python3.11
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
T5     := .venv/transformers5
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
PEERS  := .venv-peers .venv-peers-2 .venv-peers-3

.PHONY: setup demo test test-full test-transformers5 check bench crash fuzz soak mutants coverage lock clean

setup: .venv/.ready

# torch first and alone, and not locked: a resolver may bring a CUDA build of several GB, and the builds of one version have
# different files on different indexes. All else is installed by the sha256 of its files. For an index that serves other
# files of the same versions: make setup LOCKED="-r requirements/full.txt -r requirements/models.txt"
# LOCKED5="-r requirements/transformers5.txt"
LOCKED  ?= --require-hashes -r requirements/lock.txt
LOCKED5 ?= --require-hashes -r requirements/transformers5-lock.txt

.venv/.ready: requirements/lock.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --no-deps $(LOCKED)
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# The second leg: transformers 5 and what it alone needs, laid over the same environment.
$(T5)/.ready: requirements/transformers5-lock.txt .venv/.ready
	rm -rf $(T5)
	$(PIP) --no-deps --target $(T5) $(LOCKED5)
	touch $@

demo: setup
	$(BIN)/dwindle demo -o demo-run

test: test-full test-transformers5

test-full: setup
	$(BIN)/python -P -m pytest -q $(SPREAD)

test-transformers5: $(T5)/.ready
	PYTHONPATH=$(T5) $(BIN)/python -P -m pytest -q $(SPREAD) -m "not slow and not demo" tests/core tests/prune tests/quantize tests/export/test_decoder.py

# Types are checked against a plain install: type checkers cannot follow an editable package-dir mapping.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types
	$(PIP) --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p dwindle
	$(BIN)/python -P -m pytest -q tests/test_house.py

bench: setup $(PEERS:%=%/.ready)
	$(BIN)/python -P benchmarks/run.py $(PEERS:%=--peers %/bin/python)

# The long checks of docs/reliability.md; short versions of the first two are part of `make test`.
KILLS ?= 200
CASES ?= 1000000
RUNS  ?= 200

crash: setup
	$(BIN)/python tests/reliability/crash.py --kills $(KILLS)

fuzz: setup
	$(BIN)/python tests/reliability/fuzz.py --cases $(CASES)
	$(BIN)/python -c "import atheris" || $(PIP) atheris==3.0.0
	$(BIN)/python tests/reliability/fuzz.py --cases 0 --atheris 20000

soak: setup
	$(BIN)/python tests/reliability/soak.py --runs $(RUNS)

mutants: setup
	$(BIN)/python tests/reliability/mutants.py

coverage: setup
	$(BIN)/python -c "import coverage" || $(PIP) coverage==7.17.3
	rm -f .coverage .coverage.*
	$(BIN)/python -P -m coverage run -m pytest -q $(SPREAD) -m "not demo"
	$(BIN)/python -P -m coverage combine --quiet
	$(BIN)/python -P tests/reliability/coverage_by_room.py

# From the pins to the sha256 of every file of each, for all platforms; and the page of licences.
UV       := uv==0.13.9
COMPILED := pip compile --quiet --generate-hashes --no-deps --python-version 3.11 --no-header --no-annotate
lock: setup
	$(BIN)/python -c "import uv" || $(PIP) $(UV)
	$(BIN)/python -m uv $(COMPILED) requirements/full.txt requirements/models.txt -o requirements/lock.txt
	$(BIN)/python -m uv $(COMPILED) requirements/transformers5.txt -o requirements/transformers5-lock.txt
	$(BIN)/python requirements/licences.py > docs/licences.md

.venv-peers/.ready: requirements/peers.txt
.venv-peers-2/.ready: requirements/peers-2.txt
.venv-peers-3/.ready: requirements/peers-3.txt
$(PEERS:%=%/.ready):
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf build demo-run .pytest_cache .mypy_cache .ruff_cache
