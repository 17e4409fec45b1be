# make demo   drop a task file, let the real Codex CLI run it, show the answer: no account needed
# make test   run the tests
# Both do all the set-up, into .venv; the second time it costs nothing.
# make deb    build the Debian package, into dist/: on Debian 12 or newer

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# What a test run takes besides: make test TESTS='tests/test_ledger.py -x'
TESTS ?= -n auto --dist loadgroup
COVERED ?=
RUNNER ?= $(VENV)/bin/python
PROOFS ?= tests/proof tests/test_dry.py::test_twenty_tasks_while_the_quota_runs_dry \
    tests/test_spool.py::test_a_file_swapped_while_it_is_read_is_one_thing_or_the_other

.PHONY: venv demo test lint bench proof proof-long soak coverage deb clean

venv: $(READY)

$(READY): setup.cfg pyproject.toml codexd/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'codexd needs Python 3.11 or newer; name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo '$(PYTHON) cannot make virtual environments: python3-venv is missing'; \
	    test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -y -qq python3-venv && \
	    $(PYTHON) -c 'import venv, ensurepip'; } || { \
	    echo 'install it (Debian, Ubuntu: sudo apt-get install python3-venv) and run make again' >&2; \
	    exit 1; }
	@echo 'Setting up $(VENV): codexd, the Codex CLI (about 110 MB to fetch) and the test tools'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[codex,test]'
	@touch $@

demo: $(READY)
	@examples/demo.sh

test: $(READY)
	$(RUNNER) -m pytest $(TESTS) $(COVERED)

# The tests with branch coverage, as continuous integration runs them.  HACKING says what of a
# run cannot be counted.
COVERAGE := --cov=codexd --cov-branch --cov-config=tests/coverage.ini
coverage: $(READY)
	@mkdir -p build
	@cp tests/bin/python-counted $(VENV)/bin/
	@$(MAKE) test RUNNER='$(CURDIR)/$(VENV)/bin/python-counted' \
	    COVERED='$(COVERAGE) --cov-report=term-missing:skip-covered --cov-report=json:build/coverage.json'
	@$(VENV)/bin/python -m tests.undecided build/coverage.json

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Crash proofs and the like, in full: half an hour and more; proof-long takes days.  As root,
# or what mounts file systems is skipped.  SEED=… plays a run again.
proof: $(READY)
	PROOF=full $(VENV)/bin/python -m pytest $(PROOFS)

proof-long: $(READY)
	PROOF=long $(VENV)/bin/python -m pytest $(PROOFS)

# Mixed load for HOURS; a line a minute, and status 1 when something does not stay flat.
HOURS ?= 1
soak: $(READY)
	$(VENV)/bin/python -m tests.proof.soak --hours $(HOURS)

bench: $(READY)
	$(VENV)/bin/python -m bench

# From a copy, so that nothing is left in the tree; by the system's Python, not that of a venv.
DIST ?= dist
BUILD ?= build/deb
SHIPPED := codexd config debian examples man systemd LICENSE NEWS README.md pyproject.toml setup.cfg

deb: export PATH := /usr/sbin:/usr/bin:/sbin:/bin
deb:
	@command -v dpkg-buildpackage >/dev/null || { \
	    echo 'make deb: on Debian and Ubuntu: sudo apt-get install dpkg-dev' >&2; exit 1; }
	@missing=$$(dpkg-checkbuilddeps debian/control 2>&1 | \
	    sed -n 's/ ([^)]*)//g; s/.*Unmet build dependencies: //p') && \
	    { test -z "$$missing" || { \
	    echo "make deb: missing; sudo apt-get install $$missing" >&2; exit 1; }; }
	@rm -rf '$(BUILD)' && mkdir -p '$(BUILD)/codexd' '$(DIST)'
	@tar --create --exclude=__pycache__ $(SHIPPED) | \
	    tar --extract --no-same-owner --directory='$(BUILD)/codexd'
	@cd '$(BUILD)/codexd' && dpkg-buildpackage --build=binary --no-sign >../log 2>&1 || { \
	    cat ../log >&2; exit 1; }
	@mv '$(BUILD)'/*.deb '$(DIST)'/ && rm -rf '$(BUILD)' && ls '$(DIST)'/*.deb

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
