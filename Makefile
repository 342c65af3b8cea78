# Two commands: `make demo` (no torch, no GPU) and `make test` (the whole CPU suite).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# JetPack brings its own OpenCV with GStreamer: a venv there sees it, and no wheel shadows it.
IS_JETSON := $(wildcard /etc/nv_tegra_release)
VENV_FLAGS := $(if $(IS_JETSON),--system-site-packages)
DEMO_EXTRAS := $(if $(IS_JETSON),,[opencv])

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(BIN)/edgetrack demo --output demo.mp4

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m ""

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(VENV)/.demo: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.$(DEMO_EXTRAS)'
	touch $@

# torch comes first and alone: a plain `pip install` of the extras would fetch its CUDA build.
$(VENV)/.dev: $(BIN)/pip pyproject.toml
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH_VERSION)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

TORCH_VERSION ?= 2.13.0

clean:
	rm -rf $(VENV) demo.mp4 runs build *.egg-info
