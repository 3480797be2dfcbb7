# Two commands matter: `make demo` and `make test`. Each makes .venv first, if it is missing or out of date; nothing else
# has to be installed but Python 3.10 to 3.13. Another Python than python3: make test PYTHON=python3.12

PYTHON ?= python3
# Processes that share the tests. Each loads torch, so that many of them want much memory.
WORKERS ?= 2
PYTEST_FLAGS ?=
# Damaged files and messages of each kind that `make fuzz` tries; `make test` tries some dozens.
FUZZ_EXAMPLES ?= 20000
# What `make mutants` plants: faults of each file (or all), which of them, and patterns of files; nothing means every file.
SAMPLE ?= 20
SEED ?= 0
FILES ?=
MUTANTS_FLAGS ?=
# `make test-server` runs the server in this one, and the clients in PYTHON.
SERVER_PYTHON ?= $(PYTHON)
SERVER_TESTS := tests/test_serving.py tests/test_serving_faults.py tests/test_serving_lifecycle.py

# `make test-providers` runs these with this package of ONNX Runtime, such as onnxruntime-openvino or onnxruntime-gpu.
PACKAGE ?= onnxruntime-openvino
PROVIDER_TESTS := tests/test_providers.py tests/test_execution.py

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# One thread for each process: the tests run side by side, and threads that wait for each other are slower than one.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 QUARTERMAP_THREADS=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test native tensorrt node triton lint typecheck pytest test-exhaustive mutants mutants-touched test-tensorrt \
	test-server test-providers test-compat fuzz \
	format bench evidence train-demo-model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: native ## compile the digits model with and without QuarterMap, prove parity, compare
	@$(RUN) -m quartermap_deploy.demo

test: lint typecheck pytest mutants-touched ## everything that continuous integration checks

native: $(STAMP) ## build the CPU library, where there is a C++ compiler; nothing needs it
	@$(RUN) -m quartermap_deploy native build >/dev/null || echo "going on without the CPU library" >&2

lint: $(STAMP) ## ruff: rules and format
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

typecheck: $(STAMP) ## mypy, strict, on the package
	@$(RUN) -m mypy

# Real TensorRT libraries and bindings: the registry, the runtime and the names of the module, without a GPU; 160 MB.
TENSORRT := $(patsubst tests/tensorrt_releases/%.txt,build/tensorrt/%/.installed,$(wildcard tests/tensorrt_releases/*.txt))

tensorrt: $(TENSORRT) ## fetch the real TensorRT libraries that tests load, where they are to be had

build/tensorrt/%/.installed: tests/tensorrt_releases/%.txt $(STAMP)
	@rm -rf $(@D)
	@$(RUN) -m pip install --disable-pip-version-check -q --no-deps --only-binary :all: --target $(@D) -r $< && touch $@ || \
		echo "TensorRT $* is not to be had here: tests with it will skip" >&2

# ONNX Runtime for browsers and for Node.js, which the tests of sites and examples load; 440 MB once unpacked.
node: build/node/.installed ## fetch the packages of npm that tests load, where npm is there

build/node/.installed: tests/npm/package-lock.json
	@mkdir -p $(@D)
	@cp tests/npm/*.json $(@D)
	@(command -v npm >/dev/null && cd $(@D) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) && touch $@ || \
		echo "the packages of npm are not to be had here: tests with them will skip" >&2

# A real Triton without its ONNX Runtime backend, and the NumPy that its Python backend wants; 220 MB once unpacked.
triton: build/triton/.installed ## fetch the real Triton that tests start, where it is to be had

build/triton/.installed: tests/triton_server/requirements.txt $(STAMP)
	@rm -rf $(@D)
	@$(RUN) -m pip install --disable-pip-version-check -q --no-deps --only-binary :all: --target $(@D) -r $< && touch $@ || \
		echo "Triton is not to be had here: tests with it will skip" >&2

# Bytecode is kept, even where the environment says otherwise: tests start hundreds of processes.
pytest: native tensorrt node triton ## the tests alone; PYTEST_FLAGS="-k scan" chooses some
	@$(ONE_THREAD) PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS)

test-exhaustive: native ## the combinations that make test leaves out, as they take the ways of others
	@$(ONE_THREAD) PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal -m exhaustive $(PYTEST_FLAGS)

# Each test here loads a library of NVIDIA's: TensorRT for RTX, or the bindings and the lean runtime of TensorRT.
TENSORRT_TESTS := tests/test_real_tensorrt.py tests/test_rtx_plugin.py tests/test_tensorrt_rtx.py tests/test_tensorrt_calls.py

test-tensorrt: tensorrt ## the tests with real TensorRT libraries alone, timed, in one process: under three minutes on two quiet cores
	@$(ONE_THREAD) bash -c 'time "$$@"' timed $(RUN) -m pytest -q --durations=10 $(PYTEST_FLAGS) $(TENSORRT_TESTS)

test-server: $(STAMP) ## the server in another Python, without torch: make test-server SERVER_PYTHON=python3.13
	@$(SERVER_PYTHON) -m venv --clear build/server
	build/server/bin/pip install --disable-pip-version-check -q -c constraints.txt -r tests/server_requirements.txt
	@$(ONE_THREAD) PYTHONPATH="$(CURDIR)" QUARTERMAP_SERVER_PYTHON="$(CURDIR)/build/server/bin/python" \
		$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS) $(SERVER_TESTS)

test-providers: native ## providers of another package of ONNX Runtime: make test-providers PACKAGE=onnxruntime-openvino
	@$(RUN) -m venv --clear build/providers
	build/providers/bin/pip install --disable-pip-version-check -q --no-deps $(PACKAGE)
	@# Everything but ONNX Runtime comes from .venv, behind what was installed here.
	@$(RUN) -c 'import site; print(site.getsitepackages()[0])' > build/providers/other.pth
	@mv build/providers/other.pth "$$(build/providers/bin/python -c 'import site; print(site.getsitepackages()[0])')"
	@$(ONE_THREAD) PYTHONPATH="$(CURDIR)" build/providers/bin/python -m pytest -q $(PYTEST_FLAGS) $(PROVIDER_TESTS)

# Tools of others, each with a folder of its own, as versions of one tool exclude each other; 500 MB.
COMPAT := $(patsubst tests/tool_releases/%.txt,build/compat/%/.installed,$(wildcard tests/tool_releases/*.txt))

build/compat/%/.installed: tests/tool_releases/%.txt $(STAMP)
	@rm -rf $(@D)
	@$(RUN) -m pip install --disable-pip-version-check -q --no-deps --only-binary :all: --target $(@D) -r $< && touch $@ || \
		echo "$* is not to be had here: tests with it will skip" >&2

test-compat: native $(COMPAT) ## our files in other tools, docs/other-tools.md: OpenVINO, older ONNX Runtimes, optimisers
	@$(ONE_THREAD) QUARTERMAP_COMPAT="$(CURDIR)/build/compat" $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS) \
		tests/test_other_tools.py

fuzz: $(STAMP) ## damage what strangers may send in many more ways, for an hour or so: make fuzz FUZZ_EXAMPLES=20000
	@$(ONE_THREAD) QUARTERMAP_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(RUN) -m pytest -q --durations=0 -n $(WORKERS) --dist loadfile \
		$(PYTEST_FLAGS) tests/test_fuzz_*.py

mutants: $(STAMP) ## plant small faults, count what the tests catch: make mutants FILES="passes/*.py" MUTANTS_FLAGS=--help
	@$(ONE_THREAD) PYTHONPATH=tests nice $(RUN) -m mutants --sample $(SAMPLE) --seed $(SEED) $(if $(FILES),--files '$(FILES)') \
		$(MUTANTS_FLAGS)

mutants-touched: $(STAMP) ## the same in 45 seconds, in the files that a change touches
	@$(ONE_THREAD) PYTHONPATH=tests $(RUN) -m mutants --touched --seconds 45

format: $(STAMP) ## let ruff correct what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(STAMP) ## what the scan costs beside everything else in a model
	@$(RUN) benchmarks/scan_cost.py

evidence: $(STAMP) ## measure docs/evidence.md anew: accuracy, comparisons, ablations, choice of blocks
	@$(RUN) benchmarks/evidence.py

train-demo-model: $(STAMP) ## train models/vmamba_digits.safetensors anew, in some minutes
	@$(RUN) models/train_digits.py

clean: ## remove caches and built distributions; .venv and bundles stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and alone: asked for exactly, pip takes a build for CPUs where it is told of one (see README.md),
# and any looser request that comes later is content with what is there.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || { \
		echo "quartermap-deploy needs Python 3.10 to 3.13, and $(PYTHON) is none of them;" \
			"name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Engines for RTX are built without a GPU, on Linux and Windows; elsewhere their tests skip.
	@$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[tensorrt-rtx]' || \
		echo "TensorRT for RTX is not to be had here: its tests will skip" >&2
	@touch $@
