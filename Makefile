# Every target works in .venv, which is made at the first use and again when its lists change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SGLANG_VERSIONS := 0.5.20 0.5.21 0.5.22 0.5.23
WHEELS := out/wheels

# One thread per process: SGLang's CPU path is 30 times slower when its small products are threaded.
export OMP_NUM_THREADS ?= 1

.PHONY: help venv demo test soak lint compat evidence clean

help:
	@echo "make demo    serve the small model with SGLang on this machine's CPU and check its answers"
	@echo "make test    the whole test suite"
	@echo "make soak    five minutes of 64 requests at once, with pictures: answers and memory"
	@echo "make lint    ruff and mypy"
	@echo "make compat  check every SGLang name used against SGLang $(SGLANG_VERSIONS)"
	@echo "make evidence [TRITON=3.6.0]   compile every kernel for sm_90 and sm_100 and check its machine code"
	@echo "make venv    only the environment, in $(VENV)"
	@echo "make clean   remove $(VENV) and out/"

venv: $(STAMP)

# Editable, so a change of a source file needs no new install. pip compiles the bytecode: every start
# of a server imports thousands of files in several processes, which would compile them each time
# where PYTHONDONTWRITEBYTECODE is set.
$(STAMP): pyproject.toml setup.py cpu_platform/pyproject.toml requirements/cpu-no-deps.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-warn-conflicts -e ".[cpu,test]"
	$(PIP) install --no-deps ./cpu_platform -r requirements/cpu-no-deps.txt
	$(BIN)/python -c "import sglang, step37_ext, step37_kernels"
	touch $@

demo: $(STAMP)
	$(BIN)/step37 demo

# Two at once: most tests keep one core busy, and a live server takes up to 2 GB.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

soak: $(STAMP)
	STEP37_SOAK_SECONDS=300 $(BIN)/python -m pytest -s tests/serving/test_load.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip takes one version of a package at a time; a wheel that is there already is not asked for.
compat: $(STAMP)
	@for version in $(SGLANG_VERSIONS); do \
	    ls $(WHEELS)/sglang-$$version-*.whl >/dev/null 2>&1 || \
	    $(PIP) download --quiet --no-deps --only-binary :all: --dest $(WHEELS) sglang==$$version \
	    || exit 1; \
	done
	$(BIN)/python -m step37_ext.compat $(SGLANG_VERSIONS:%=$(WHEELS)/sglang-%-*.whl)

# Triton alone is taken in another version, beside the environment's torch: it compiles without it.
evidence: $(STAMP)
ifdef TRITON
	test -d out/triton-$(TRITON) || $(PIP) install --quiet --no-deps --target out/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=out/triton-$(TRITON) $(BIN)/python -m step37_kernels.evidence
else
	$(BIN)/python -m step37_kernels.evidence
endif

clean:
	rm -rf $(VENV) out
