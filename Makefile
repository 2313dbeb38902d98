# make demo    set everything up and generate the demo's videos into demo_output/
# make serve   set everything up and start the interactive page, http://127.0.0.1:8765
# make test    set everything up and run the tests
# make test-anywhere    run the numerical tests again, with the plainest kernels that PyTorch has for this CPU
# make lint    formatting, lint, types and spelling
# make docs    the documentation as a site, build/site/index.html
# make wheel   a wheel in dist/, with the CUDA kernels if nvcc is found (LONGLIVE_RAG_CUDA=ON: or fail)
# make wheels  the source distribution and a wheel for each of PYTHONS, tried in clean environments
#
# PYTHON: the interpreter to set up with, 3.10 to 3.13.     TORCH: what to install as torch, as for pip.
# VENV: where the virtual environment goes.                 PYTEST_ARGS: more arguments for pytest.
# PYTHONS: versions to make wheels for; on PATH or in pyenv.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHONS ?= 3.10 3.11 3.12 3.13
PYTEST_ARGS ?=

# Newer ones need torch.accelerator, which torch 2.6 brought.
BESIDE := $(if $(filter torch==2.5%,$(TORCH)),"diffusers==0.36.*" "transformers==4.51.*")
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(filter %.h %.cuh %.cpp %.cu,$(shell find csrc tests -type f))
NUMERICAL_TESTS := $(addprefix tests/,backbones embedding engine generation golden models ops)

.PHONY: demo serve test test-anywhere lint docs wheel wheels clean

demo: $(VENV)/installed
	$(BIN)/longlive-rag demo --output demo_output

serve: $(VENV)/installed
	$(BIN)/longlive-rag serve

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# No vector instructions beyond SSE in PyTorch, oneDNN and MKL, and one thread: sums in another order than usual.
test-anywhere: export ATEN_CPU_CAPABILITY = default
test-anywhere: export ONEDNN_MAX_CPU_ISA = SSE41
test-anywhere: export MKL_CBWR = COMPATIBLE
test-anywhere: export OMP_NUM_THREADS = 1
test-anywhere: $(VENV)/installed
	$(BIN)/python -m pytest -k "not emulated" $(NUMERICAL_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/typos

# Strict: a link or an anchor that leads nowhere fails. The variable silences an advertisement of the theme's.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(BIN)/python
	$(PIP) wheel --no-deps --wheel-dir dist .

wheels:
	TORCH="$(TORCH)" .ci/wheels $(PYTHONS)

clean:
	rm -rf $(VENV) build dist demo_output serve_output

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; give another: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and by exact version: the newest one would otherwise be taken, with gigabytes of CUDA libraries.
$(VENV)/torch: | $(BIN)/python
	$(PIP) install "$(TORCH)"
	@touch $@

# Editable: Python files are used where they lie, so only a change of the native code or of the metadata installs again.
$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE_SOURCES)
	$(PIP) install --editable ".[dev,wan]" $(BESIDE)
	@touch $@
