# make demo      install, distil the digits, show the result
# make test      everything that CI runs: lint, types, tests
# make gpu       on a machine with an NVIDIA GPU: GPU tests and quick benchmarks
# make bench     the published tables' benchmarks, hours; `ddfast bench --quick` takes two minutes
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test lint unit sanitize gpu bench bench-check clean

# One environment for everything, with the versions of constraints.txt. The compiled kernels are
# rebuilt when their sources change.
.venv/installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/ddfast distill dm --dataset digits --ipc 10 --out runs/demo --evaluate

test: lint unit

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: two processes share two cores, and results do not depend on threads.
unit: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the normal ones.
# Left out: nvcc, which cannot bear a preloaded sanitizer, and tests of memory, which it takes itself.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: .venv/installed
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc ddfast kernels benchmarks setup.py pyproject.toml MANIFEST.in README.md LICENSE build/sanitize/
	rm -f build/sanitize/ddfast/_C* build/sanitize/ddfast/_cuda*
	cd build/sanitize && CXXFLAGS="$(SANITIZE) -g -O1" LDFLAGS="$(SANITIZE)" \
	  ../../$(BIN)/python -m pip install --quiet --no-deps --target site .
	export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(CURDIR)/build/sanitize/site; \
	$(BIN)/python -P -c "from ddfast import _C; assert 'sanitize' in _C.__file__, _C.__file__" && \
	$(BIN)/pytest -q -s -p no:cacheprovider tests/ops -k "not triton and not compile and not inductor and not nvcc and not stored"

# Needs a Python that already has torch, triton, pytest, pybind11 and ninja; fetches nothing.
GPU := gpu-results
gpu:
	@$(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
	  { echo "make gpu: PyTorch of $(PYTHON) sees no NVIDIA GPU, so there is nothing to run"; exit 1; }
	rm -rf build/gpu $(GPU) && mkdir -p build/gpu $(GPU)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --target build/gpu .
	PYTHON="$(PYTHON)" RESULTS=$(GPU) PYTHONPATH=$(CURDIR)/build/gpu PYTHONSAFEPATH=1 \
	  bash benchmarks/gpu.sh 2>&1 | tee $(GPU)/log.txt; exit $${PIPESTATUS[0]}

bench: .venv/installed
	rm -f benchmarks/results/cpu.csv
	$(BIN)/ddfast bench --published --device cpu --out benchmarks/results/cpu.csv

# A few speeds beside plain PyTorch that no change may undercut; not part of `make test`, since they
# depend on what else the machine does.
bench-check: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q benchmarks/test_ratios.py --benchmark-enable

clean:
	rm -rf build dist .venv *.egg-info ddfast/_C*.so ddfast/_cuda*.so gpu-results
