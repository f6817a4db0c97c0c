# Everything happens in .venv. The first two targets are all that a newcomer needs: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint types docs bench audit clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/postgrad demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --reliability=check

lint: setup
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m postgrad.docs_pages

bench: setup
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.report

# Known vulnerabilities of the pinned versions: a report that fails nothing, since a new entry is no change of ours.
audit: .audit/.ready
	-timeout 120 .audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off --timeout 20

.audit/.ready:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

clean:
	rm -rf $(VENV) .audit
