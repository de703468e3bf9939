# Everything from nothing but git, python3 (3.11+), pip and make.
#   make demo   the whole path on a real model: quantize, build, serve, ask, bench
#   make test   the test suite
#   make lint   ruff and mypy
#   make dist-check   sdist and wheel, built, installed in clean environments and run there
#   make test-page   the page in Chromium, where that is installed
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= auto
BIN := $(VENV)/bin
# What makes engines; on a machine with an NVIDIA driver, what cuda engines need beside a torch with CUDA as well.
EXTRAS := $(if $(wildcard /dev/nvidiactl),[cuda],[quantize])

.PHONY: demo test test-kernels test-page test-slow dist-check sanitize gpu-table peer-table docs site lint format clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# Every CUDA kernel for every supported architecture: a spill or a stack frame fails.
# With NVRTC=13.0.*: by another compiler than the one that is installed (that of CUDA PyTorch, for one).
test-kernels: $(VENV)/.installed-dev
	$(if $(NVRTC),$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --upgrade --target '$(VENV)/nvrtc' 'nvidia-cuda-nvrtc==$(NVRTC)')
	$(if $(NVRTC),PYTHONPATH=$(VENV)/nvrtc )$(BIN)/python -m pytest -n $(WORKERS) -m $(if $(NVRTC),'',slow) tests/targets/cuda/test_compile.py tests/targets/cuda/test_registry.py tests/cli/test_build.py -k 'not test_build or cuda'

# With each Python of 3.11 to 3.13 that is here: of PYTHONS, on the path, or pyenv's.
dist-check: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m slow tests/test_distribution.py

# The page in a real browser: chromium or google-chrome of the system, or what CHROMIUM names; none is downloaded.
test-page: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m slow tests/e2e/test_page_in_chromium.py tests/e2e/test_page_exports_in_chromium.py

# The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; planted faults must be reported.
sanitize: $(VENV)/.installed-dev
	$(BIN)/python scripts/sanitize.py

# The page's figures from a GPU, out of docs/gpu. With RESULTS=folder: of a run of scripts/gpu_check.sh --engine, kept there.
gpu-table: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python scripts/gpu_figures.py $(if $(RESULTS),--results '$(RESULTS)')

# Tables of other servers and their charts, README's too, out of docs/cpu. With RESULTS=report.json PROCESSOR=amx: of a run of bench_peers.py on such a processor.
peer-table: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python scripts/peer_figures.py $(if $(RESULTS),--results '$(RESULTS)' --processor '$(PROCESSOR)')

# The pages that are made of the code and of results. A test says when one is not what they say.
docs: $(VENV)/.installed-dev
	for page in api_page cli_page family_table format_tables gpu_figures peer_figures; do PYTHONPATH=. $(BIN)/python scripts/$$page.py || exit 1; done

# The documents as a site, in build/site. With REPO_URL=https://…: links out of docs/ lead there.
site: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 REPO_URL='$(REPO_URL)' $(BIN)/mkdocs build --quiet

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check llmctl tests scripts
	$(BIN)/ruff format --check llmctl tests scripts
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix llmctl tests scripts
	$(BIN)/ruff format llmctl tests scripts

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"llmctl needs Python 3.11 or newer, found {v.major}.{v.minor}; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.$(EXTRAS)'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,cuda]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache build *.egg-info
