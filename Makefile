# Two commands do everything on a fresh machine: `make serve` and `make test`. Each makes the environment if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The library's image and audio parts are not used; without them it compiles in half the time.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF

.PHONY: serve test slow check lock

serve: $(VENV)/.serve  ## serve the built-in model: make serve, or make serve MODEL=path.gguf ARGS="--port 9000"
	$(BIN)/afterword serve $(MODEL) $(ARGS)

test: $(VENV)/.dev  ## run all tests but the slow ones
	$(BIN)/python -m pytest

slow: $(VENV)/.dev  ## run all tests
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(VENV)/.dev  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.serve: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.serve requirements-dev.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	touch $@

lock:  ## renew requirements*.txt from pyproject.toml (needs uv)
	uv pip compile --universal --generate-hashes --no-header --quiet pyproject.toml --group build -o requirements.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group dev -c requirements.txt -o requirements-dev.txt
