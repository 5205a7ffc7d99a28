# The one set of commands, for people and for CI. `make help` lists them.
# Each target makes .venv and installs what it needs first; nothing else has to be set up.

VENV ?= .venv
JOBS ?= 2
# The newest transformers that everything was tried with; constraints.txt pins the oldest.
TRANSFORMERS ?= 5.24.0
ARGS ?=
BIN := $(VENV)/bin
IN_RANGE := import sys, venv, ensurepip; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# One thread a test process: two processes with two threads each are slower on two cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-transformers test-faults families launch audit licences check format bench pins hooks clean distclean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "  make %-17s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed-demo  ## fine-tune the shipped tiny Gemma-3 and show what it learned (under 4 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/vlmtune demo $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests on both cores (ARGS="-k name" for some of them)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev  ## run the tests that take minutes each, which `make test` leaves out
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

OTHER := $(VENV)/transformers-$(TRANSFORMERS)
WITH_OTHER := PYTHONPATH=$(abspath $(OTHER))
test-transformers: $(VENV)/.installed-dev $(OTHER)  ## prove the families on another transformers (TRANSFORMERS=5.24.0)
	@$(WITH_OTHER) $(BIN)/python -c "import transformers as t; assert t.__version__ == '$(TRANSFORMERS)', t.__file__"
	$(WITH_OTHER) $(BIN)/python -m pip check
	$(WITH_OTHER) $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not slow or proves" \
		tests/parity tests/models tests/invariants tests/batching $(ARGS)

families: $(VENV)/.installed-dev  ## prove every family anew, and write what is supported to docs/families.md
	$(TEST_ENV) $(BIN)/python -m pytest -m proves tests/parity/families tests/invariants/test_sharing.py \
		--write-proofs src/vlmtune/models/families/proved.json
	$(BIN)/python scripts/write_families.py

test-faults: $(VENV)/.installed-dev  ## kill, stop and starve real runs again and again (half an hour on one core)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) tests/faults $(ARGS)

launch: $(VENV)/.installed-dev  ## let SkyPilot itself check recipes/launch (in .venv-skypilot: it needs 450 MB)
	@test -x .venv-skypilot/bin/python || $(BIN)/python -m venv .venv-skypilot
	@.venv-skypilot/bin/python -m pip install -q skypilot==0.14.1
	.venv-skypilot/bin/python -c "import sky; print(sky.Task.from_yaml('recipes/launch/skypilot.yaml'))"

licences: $(VENV)/.installed-dev  ## check the licences of everything that vlmtune needs
	$(BIN)/python scripts/licences.py

audit: $(VENV)/.installed-dev  ## look for known weaknesses in what is pinned (asks PyPI's advisory service)
	@$(BIN)/python -m pip install -q -c constraints.txt pip-audit
	@$(BIN)/python scripts/audit.py

check: $(VENV)/.installed-dev  ## style, types, import layers and file lengths
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@find src -name '*.py' -exec wc -l {} + | awk '$$2 != "total" && $$1 > 400 { print $$2 " has " $$1 " lines; split it (400 at most)"; bad = 1 } END { exit bad }'

format: $(VENV)/.installed-dev  ## bring every file into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench  ## run the benchmarks; each prints hardware, versions and medians
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; HF_HUB_OFFLINE=1 $(BIN)/python $$file $(ARGS) || exit 1; done

install: $(VENV)/.installed-dev  ## only make the virtual environment

hooks: $(VENV)/.installed-dev  ## check style before every commit
	$(BIN)/pre-commit install

pins: $(VENV)/.installed-dev  ## write what is installed to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/ @ .*//; s/\+[a-z0-9]+$$//' | grep '=='; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## delete build output and caches; runs stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests scripts utils benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and delete the virtual environment
	rm -rf $(VENV) .venv-skypilot

# One stamp for each extra of pyproject.toml; it is newer than what it was made from, so a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

$(VENV)/transformers-%: | $(BIN)/python
	$(BIN)/python -m pip install -q --no-deps --target $@ transformers==$*

$(BIN)/python:
	@python=$${PYTHON:-$$(for p in python3 python3.12 python3.11 python3.13; do \
		$$p -c "$(IN_RANGE)" 2>/dev/null && echo $$p && break; done)}; \
	if [ -z "$$python" ]; then \
		echo "vlmtune needs Python 3.11, 3.12 or 3.13 with its venv module (on Debian: apt install python3-venv)." >&2; \
		echo "If it is not on the PATH, name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; "$$python" -m venv $(VENV)
