# Every target sets up what it needs: it takes python3.11 or later (with venv), g++ and make, and nvcc for the CUDA
# kernels where it is found. `make PYTHON=python3.12`, `make CUDA=OFF` override what is found, `make test JOBS=1` runs
# the tests one after the other.

PYTHON ?= python3
CUDA ?= $(if $(shell command -v nvcc),ON,OFF)
JOBS ?= $(shell nproc)
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEER := $(VENV)/.pydensecrf
EXTRAS := test bench demo lint
CXX_SOURCES = $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NO_CUDA := no nvcc on PATH: the CUDA kernels are neither built nor tested

# Configures and builds one variant in place of its last state: $(call build,folder,options)
build = PATH="$(BIN):$$PATH" cmake -G Ninja -S . -B $(1) -DPython_EXECUTABLE=$(BIN)/python $(2) >$(1).log \
          || { cat $(1).log; exit 1; }; \
        grep '^-- pyseg:' $(1).log; \
        PATH="$(BIN):$$PATH" cmake --build $(1)

.PHONY: help dev demo test bench lint format sanitize check-cuda wheel clean distclean

help:
	@echo 'make demo        cut the subject out of three photographs with an accelerated U2-Net'
	@echo 'make test        build and run the whole test suite'
	@echo 'make bench       measure pyseg beside its peers'
	@echo 'make lint        ruff, mypy, clang-format'
	@echo 'make format      apply the formatters'
	@echo 'make sanitize    CPU tests under the address, undefined-behaviour and thread sanitizers'
	@echo 'make check-cuda  check the CUDA kernels, without a GPU too'
	@echo 'make dev         build in place; afterwards .venv/bin/python imports this tree'
	@echo 'make wheel       sdist and wheel, CUDA kernels for all architectures, in dist/'
	@echo 'ARGS=... is handed to pytest, the demo, the benchmark or the CUDA check: make test ARGS="-k depthwise"'
	@echo 'make clean       remove what was built; make distclean removes .venv too'

$(READY): pyproject.toml tools/requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo '$(PYTHON) is older than 3.11: name a newer one, make PYTHON=python3.12'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch and the other requirements into .venv ...'
	@$(BIN)/python tools/requirements.py $(EXTRAS) >$(VENV)/requirements.txt
	@$(BIN)/python -m pip install --quiet --quiet -r $(VENV)/requirements.txt
	@echo '$(CURDIR)' >"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pyseg-dev.pth"
	@touch $@

# Without it the tests that compare with it are skipped, and its column is missing from the benchmark.
$(PEER): $(READY) tools/install_pydensecrf.sh
	@echo 'building pydensecrf2, a peer of tests and benchmarks ...'
	@if tools/install_pydensecrf.sh $(BIN)/python >$(VENV)/pydensecrf.log 2>&1; then touch $@; \
	  else tail -5 $(VENV)/pydensecrf.log; echo 'pydensecrf2 could not be built: going on without it'; fi

dev: $(READY)
	@$(if $(filter OFF,$(CUDA)),echo '$(NO_CUDA)')
	@mkdir -p build
	@$(call build,build/dev,-DPYSEG_INPLACE=ON -DPYSEG_CUDA=$(CUDA))

demo: dev
	@$(BIN)/python examples/segment_photo.py $(ARGS)

test: dev $(PEER)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

bench: dev $(PEER)
	@$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(READY)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# A package of its own beside the source tree: $(call sanitized,folder,sanitizers)
sanitized = $(call build,$(1),-DPYSEG_CUDA=OFF -DPYSEG_SANITIZE='$(2)') && \
            rm -rf $(1)/site && mkdir $(1)/site && cp -R pyseg $(1)/site && rm -f $(1)/site/pyseg/*.so && \
            cmake --install $(1) --prefix $(1)/site >/dev/null

sanitize: $(READY)
	@mkdir -p build
	@$(call sanitized,build/address,address;undefined)
	@$(call sanitized,build/thread,thread)
	@tools/sanitize.sh $(BIN)/python

check-cuda: dev
	@$(if $(filter OFF,$(CUDA)),echo '$(NO_CUDA)',$(BIN)/python tools/check_cuda.py $(ARGS))

wheel: $(READY)
	@$(BIN)/python -m build --no-isolation --outdir dist -Cbuild-dir=build/wheel \
	  -Ccmake.define.PYSEG_CUDA=$(CUDA) -Ccmake.define.PYSEG_ALL_ARCHITECTURES=ON

clean:
	rm -rf build dist pyseg/*.so tests/fakegpu/build

distclean: clean
	rm -rf $(VENV)
