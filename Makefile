# Every target sets up what it needs: .venv with the versions of .ci/constraints.txt, or, with
# PYTHON=/path/to/python, an environment that already has torch (nothing is downloaded into it).
# ARGS is passed on: make test ARGS="-k bn_act", make demo ARGS="--quick".
PYTHON ?=
ARGS ?=
WORKERS ?= 2
RESULTS ?= bench/results
DEVICE ?= cuda
BUDGET ?= 480
# Triton 3.6 interprets loops by a conversion that numpy 2.4 does not do any more.
OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 setuptools==81.0.0 numpy==2.3.5
NEWEST_ONLY := torch torchvision triton setuptools numpy cuda- nvidia-

CONSTRAINTS := .ci/constraints.txt
SYSTEM_PYTHON := $(shell command -v python3.11 || command -v python3)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

ifeq ($(PYTHON),)
PY := .venv/bin/python
BIN := .venv/bin
READY := .venv/.ready
else
PY := $(PYTHON)
BIN := $(shell $(PY) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
READY := build/ready$(subst /,-,$(PYTHON))
endif

.PHONY: build demo test test-full test-oldest aot-all bench gpu-check lint format clean

build: $(READY)
	$(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m fused_resnet demo $(ARGS)

test: build
	$(PY) .ci/headers.py $(firstword $(OLDEST)) $(if $(PYTHON),--may-skip)
	$(PY) -m pytest -n $(WORKERS) --require=all $(ARGS)

test-full: build
	$(PY) -m pytest -n $(WORKERS) --full --require=all $(ARGS)

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python setup.py -q build_ext --inplace
	.venv-oldest/bin/python -m pytest -n $(WORKERS) $(ARGS)

aot-all: build
	$(PY) tests/aot.py --all-types --all-configs --arch 80 86 89 90 100 120 $(ARGS)

bench: build
	$(PY) -m bench $(ARGS)

# On a machine with a GPU, within BUDGET seconds; DEVICE=cpu shows that the script works.
gpu-check: build
	$(PY) -m bench.gpu_check --results $(RESULTS) --device $(DEVICE) --budget $(BUDGET) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(PY) .ci/rules.py

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build *.egg-info fused_resnet/*.so

# The libraries need torch to be built, so it comes first; pip then adds the rest at the same pins.
.venv/.ready: $(CONSTRAINTS) pyproject.toml
	$(SYSTEM_PYTHON) -m venv .venv
	$(PY) -m pip install -c $(CONSTRAINTS) setuptools torch pybind11 ninja
	$(PY) -m pip install -c $(CONSTRAINTS) --no-build-isolation -e '.[bench,demo,dev,examples,test]'
	touch $@

.venv-oldest/.ready: $(CONSTRAINTS) pyproject.toml
	$(SYSTEM_PYTHON) -m venv .venv-oldest
	grep -v $(NEWEST_ONLY:%=-e '^%') $(CONSTRAINTS) > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -c .venv-oldest/constraints.txt $(OLDEST) pybind11 ninja
	.venv-oldest/bin/python -m pip install -c .venv-oldest/constraints.txt \
	  --no-build-isolation -e '.[demo,examples,test]'
	touch $@

build/ready%: pyproject.toml
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	mkdir -p build
	touch $@
