# make run    from a bare Python 3.11 or later to a smaller model and its report
# make test   the same environment, then the tests
# PYTHON=...  another interpreter; ARGS="..." goes to `smelt run` or to pytest; `make clean` drops the environment

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && { echo $$p; break; }; done)

.PHONY: run test lint install clean

run: $(STAMP)
	$(BIN)/smelt run $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch alone and first, by exact version: `==2.13.0` also accepts a build named 2.13.0+cpu, and pip prefers it where
# an index offers one. The build backend is installed too, so that it is pinned like everything else.
$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || { echo 'smelt needs Python 3.11 or later; name one with PYTHON=...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt hatchling editables
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV)
