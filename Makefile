# The commands of this repository. Each target does all the set-up it needs, from a clean clone:
#
#   make demo     trains a small ResNet on real images with nn.BatchNorm2d, converted and fused, side by side
#   make test     builds, and runs the tests; those marked cuda once more on the fake CUDA device, without a GPU (the second alone:
#                 make test-fake-cuda; see docs/testing.md)
#   make test-slow  the other tests, marked slow: the same claims on more dtypes, orders of threads and networks, whole runs of
#                 programs, and the kernels' machine code
#   make studies  the reproductions of what papers claim: a few minutes; plots and reports in out/studies, exit code 0 if
#                 every verdict is that of docs/why.md (make why: runs them and writes the reports into docs/why.md)
#   make mutants  applies some 290 faults to the sources, one at a time, and sees the tests nearest to each fail: hours on two
#                 cores (MUTANTS_ARGS="--area fusion": some of them; tests/support/mutants has the list)
#   make lint     ruff, mypy, clang-format, and the documentation site (make format: ruff and clang-format write)
#   make docs     the documentation site, in out/site; broken links and unknown names are errors
#   make bench    the benchmark harness (CPU, and the GPU where there is one)
#   make gpu      on a machine with a GPU, without network: both stages of bench/gpu.sh, which can be run one by one. The
#                 first (4 minutes): build, check, tests of plans, bench, hardware counters; the second (7): compute-sanitizer,
#                 the other tests, the other figures. bench/results/README.md explains the results
#   make ptxas    registers and spills of every kernel for every supported architecture (needs nvcc, no GPU)
#   make sass     access widths and instructions per element of each kernel's main loops on sm_90 (needs nvcc and nvdisasm,
#                 no GPU)
#   make build    the extension alone, in place
#   make clean    removes what was built (distclean: the environments too)
#
# Variables:
#   TORCH=torch==2.13.0    the torch to install (default: torch>=2.11), in an environment of its own
#   PYTHON=python3.12      the Python that the environment is made from (default: python3)
#   INTERPRETER=python3    no environment: this interpreter as it is. Nothing is installed and no network is needed; it must
#                          have torch and what the target uses (pyproject.toml: demo, bench, dev)
#   PYTEST_ARGS="-k cpu"   handed to pytest
#   WORKERS=2              processes that `make test` shares the test files between, where pytest-xdist is installed; 0: none
#   RESULTS=DIR            where `make gpu` and `make bench` write (default: out/gpu, out/bench)
#   MAX_JOBS=N             parallel compilers (default: the number of cores)
#   TORCH_CUDA_ARCH_LIST, CUDA_HOME, FORCE_CUDA: as in setup.py. Unlike there, where no GPU is present only sm_90 is compiled.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch>=2.11
PYTEST_ARGS ?=
MUTANTS_ARGS ?=
WORKERS ?= 2
RESULTS ?=
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS

ifndef TORCH_CUDA_ARCH_LIST
  ifeq ($(shell nvidia-smi -L 2>/dev/null),)
    export TORCH_CUDA_ARCH_LIST := 9.0
  endif
endif

# Everything runs from the repository's root, with the package built in place.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

ifdef INTERPRETER
  PY := $(INTERPRETER)
  # Targets that prepare an environment have nothing to do.
  TORCH_STAMP :=
  environment = build
else
  # One environment for each torch asked for: .venv, or e.g. .venv-torch2.13.0
  VENV := $(CURDIR)/.venv$(if $(filter-out torch>=2.11,$(TORCH)),-$(subst =,,$(subst <,,$(subst >,,$(TORCH)))))
  PY := $(VENV)/bin/python
  TORCH_STAMP := $(VENV)/.torch
  # The packages of the demo and the benchmark harness are installed together with torch.
  environment = build $(if $(filter dev,$(1)),$(VENV)/.dev)
endif

CPP_FILES = $(shell git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' \
    'tests/support/simt/*.h' 'tests/support/simt/*.cpp' 'tests/support/fake_cuda/*.h' 'tests/support/fake_cuda/*.cpp' 'tests/support/faults/*.cpp' \
    'bench/tools/*.cu' 'bench/tools/*.cuh' \
    2>/dev/null || find csrc tests/support/simt tests/support/fake_cuda tests/support/faults bench -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

STUDIES = $(filter-out __init__ study speedrun_networks,$(patsubst studies/%.py,%,$(wildcard studies/*.py)))

# The clang-format of the interpreter's environment.
CLANG_FORMAT = "$$(dirname "$$($(PY) -c 'import sys; print(sys.executable)')")/clang-format"

.PHONY: help demo studies why test test-slow test-fake-cuda mutants lint format docs bench gpu ptxas sass build clean distclean

help:
	@sed -n '1,/^$$/{/^#/!d;s/^# \{0,1\}//;p}' Makefile

# Threads that wait do not spin: on a busy machine, each step of the demo takes several times as long otherwise.
demo: export OMP_WAIT_POLICY ?= passive
demo: $(call environment,demo)
	$(PY) examples/digits.py

studies: $(call environment,demo)
	@regressions=; for study in $(STUDIES); do \
	  echo "== studies/$$study.py"; $(PY) -m "studies.$$study" --out out/studies || regressions="$$regressions $$study"; \
	done; \
	if [ -n "$$regressions" ]; then echo "== verdicts that differ from docs/why.md:$$regressions"; exit 1; fi

# Also writes the reports if a verdict differs; the text around them is then updated by hand.
why:
	-$(MAKE) studies
	$(PY) -m studies.study out/studies docs/why.md

PYTEST = -m pytest $$($(PY) -c "import xdist; print('-n $(WORKERS) --dist loadfile')" 2>/dev/null) --durations 15

# Threads that wait do not spin: those of another process could work meanwhile.
test test-slow test-fake-cuda: export OMP_WAIT_POLICY ?= passive
test: $(call environment,dev)
	$(PY) $(PYTEST) -m "not slow" $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-fake-cuda

test-slow: $(call environment,dev)
	$(PY) $(PYTEST) -m slow $(PYTEST_ARGS)

# Tests that PYTEST_ARGS selects may be none of these: pytest's exit status is 5 then.
test-fake-cuda: export PYTHONPATH := $(CURDIR)/tests/support:$(PYTHONPATH)
test-fake-cuda: $(call environment,dev)
	@reason=$$($(PY) -m fake_cuda --missing); \
	if [ -n "$$reason" ]; then echo "== no tests on the fake CUDA device: $$reason"; exit 0; fi; \
	echo "== tests marked cuda, on the fake CUDA device"; \
	$(PY) -m fake_cuda $(PYTEST) -m "cuda and not slow" $(PYTEST_ARGS) || [ $$? -eq 5 -a -n "$(PYTEST_ARGS)" ]

mutants: export PYTHONPATH := $(CURDIR)/tests/support:$(PYTHONPATH)
mutants: $(call environment,dev)
	$(PY) -m mutants $(MUTANTS_ARGS)

format: $(call environment,dev)
	$(PY) -m ruff check --fix --select I .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP_FILES)

lint: $(call environment,dev)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@echo "clang-format: $(words $(CPP_FILES)) files"
	@$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)
	@$(MAKE) --no-print-directory docs

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(call environment,dev)
	$(PY) -m mkdocs build --quiet --strict

bench: $(call environment,bench)
	$(PY) -m bench $(if $(RESULTS),--out $(RESULTS))

gpu: $(call environment,dev)
	@status=0; for stage in first second; do \
	  PYTHON="$(PY)" RESULTS="$(or $(RESULTS),$(CURDIR)/out/gpu)" bash bench/gpu.sh $$stage || status=1; \
	done; exit $$status

ptxas: $(TORCH_STAMP)
	$(PY) -m bench.tools.registers

sass: $(TORCH_STAMP)
	$(PY) -m bench.tools.sass

# ninja compiles what changed; if nothing did, this takes a few seconds.
build: $(TORCH_STAMP)
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build dist out *.egg-info bnkernels/*.so
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv*

ifndef INTERPRETER
DEMO = $(shell sed -n 's/^demo = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')

# --no-compile: compiling the bytecode of all of torch takes half a minute; imports compile what they need.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/.torch: pyproject.toml
	@echo "== environment $(VENV) from $(PYTHON); then $(TORCH) (a CUDA build is some gigabytes: minutes)"
	$(PYTHON) -m venv "$(VENV)"
	"$(PY)" -m pip install --no-compile setuptools wheel ninja $(DEMO) "$(TORCH)"
	@touch "$@"

# The package itself, editable, with the tools of development: without isolation, against the torch just installed. The pip
# of an early Python 3.10 knows no editable package of this form.
$(VENV)/.dev: pyproject.toml setup.py build_support.py | build
	@echo "== bnkernels[dev] into $(VENV)"
	"$(PY)" -m pip install --quiet --upgrade pip
	"$(PY)" -m pip install --quiet --no-build-isolation -e ".[dev]"
	@touch "$@"
endif
