# make run: set up and run the main job.   make test: set up and run the default tests.   make venv: set up only.
VENV ?= .venv
BIN := $(VENV)/bin
GIN ?= gin/runs/quickstart.gin
ARGS ?=

# The first Python on this machine that the wheels exist for.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)

# uv installs in seconds; where it cannot be had, pip does the same in minutes.
define install
	@uv=$$(command -v uv || ls $(BIN)/uv 2>/dev/null); \
	echo "make: installing $(1) with $${uv:-pip}"; \
	{ [ -n "$$uv" ] && $$uv pip install $(if $(CI),--quiet) --python $(BIN)/python -e "$(1)"; } || \
		$(BIN)/python -m pip install $(if $(CI),--quiet) -e "$(1)"
endef
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: help run test test-slow parity venv lint types bench clean

help:
	@echo "make run | test | test-slow | parity | venv | lint | types | bench | clean; ARGS=... is passed on"

run: $(VENV)/.mlm
	$(BIN)/mlm train --gin_file=$(GIN) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not parity" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

# Conversions against PyTorch and transformers themselves, which the [parity] extra brings.
parity: $(VENV)/.parity
	$(BIN)/python -m pytest -m parity $(ARGS)

venv: $(VENV)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy $(ARGS)

# The peers of some benchmarks (PyTorch, transformers, CTranslate2) are in the [parity] extra.
bench: $(VENV)/.parity
	for file in bench/[a-z]*.py; do $(BIN)/python $$file $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: mlm needs Python 3.11, 3.12 or 3.13, and python3 here is" \
		"$$(python3 --version 2>&1); install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "make: creating $(VENV) with $$($(PYTHON) --version)"
	@if command -v uv >/dev/null; then uv venv --quiet --seed --python $(PYTHON) $(VENV); else \
		$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "make: $(PYTHON) lacks the venv module; install it (Debian: apt install python3-venv) or uv" >&2; exit 1; }; \
		$(BIN)/python -m pip install --quiet uv || echo "make: no uv to be had; pip takes its place"; fi

# Stamps: an install is repeated only when setup.py changed.
$(VENV)/.mlm: setup.py | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/.dev: setup.py | $(BIN)/python
	$(call install,.[dev])
	@touch $(VENV)/.mlm $@

$(VENV)/.parity: setup.py | $(BIN)/python
	$(call install,.[dev$(comma)parity])
	@touch $(VENV)/.mlm $(VENV)/.dev $@

comma := ,
