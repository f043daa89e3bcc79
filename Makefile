# The one command surface. CI calls these targets and nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TRITON ?= 3.9.0
HOST ?= 127.0.0.1
PORT ?= 8000
URL ?= http://$(HOST):$(PORT)
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c deploy/constraints.txt
SOURCES := gateway worker protocol kernels tests

# The demo adapters fit the default model only: `make serve ARGS="--model-path ..."` starts without them.
ifeq ($(findstring --model-path,$(ARGS)),)
DEMO := --adapter-root deploy/adapters \
	--lora-paths lora0=deploy/adapters/lora0 lora1=deploy/adapters/lora1 lora2=deploy/adapters/lora2
endif

# Node's clients where there is Node; the tests say where there is none.
ifneq ($(shell command -v npm),)
NODE_CLIENTS := tests/clients/node/node_modules/.ready
endif

.PHONY: help install serve chat check lint test test-clients test-gpu bench bench-gpu bench-plots build clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.dev ## Make the virtual environment with everything, tests included

serve: $(VENV)/.serve ## Serve the default model with the demo adapters on 127.0.0.1:8000 (PORT=, ARGS=)
	$(BIN)/polylora serve --host $(HOST) --port $(PORT) $(DEMO) $(ARGS)

chat: $(VENV)/.serve ## Talk to a running server in the terminal (URL=, ARGS=)
	@$(BIN)/polylora chat --url $(URL) $(ARGS)

check: $(VENV)/.dev ## Format, lint, types, import arrows, file budget
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

lint: $(VENV)/.dev ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/.dev ## Every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-clients: $(VENV)/clients/.ready $(NODE_CLIENTS) ## The clients that applications use, before an echo worker (no GPU)
	$(VENV)/clients/bin/python -m pytest tests/clients $(ARGS)

test-gpu: $(VENV)/.dev ## The tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(VENV)/.dev ## Measure what this machine can; appends to tests/bench/results.csv and draws the plots
	$(BIN)/python -m tests.bench.bench_cpu_decode --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_engine --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_gateway --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_loads --csv tests/bench/results.csv
	@if nvidia-smi >/dev/null 2>&1; then $(MAKE) bench-gpu; fi
	$(MAKE) bench-plots

bench-gpu: $(VENV)/.dev ## Measure this machine's GPU: steps, prompts, kernels, and serving an 8B model's shape (22 GB in /tmp)
	$(BIN)/python -m tests.bench.bench_step --breakdown --lora-off --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_prefill --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_mixed --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_kernels
	$(BIN)/python -m tests.bench.bench_prefill_layer
	$(BIN)/python -m tests.bench.serve_8b --csv tests/bench/results.csv $(ARGS)
	$(BIN)/python -m tests.bench.bench_beside_loads --csv tests/bench/results.csv
	$(BIN)/python -m tests.bench.bench_first_use --csv tests/bench/results.csv

bench-plots: $(VENV)/.dev ## Draw tests/bench/plots from the CSV files
	$(BIN)/python -m tests.bench.plots

build: $(VENV)/.serve ## Build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info tests/clients/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Without a GPU a plain `pip install torch` fetches gigabytes of CUDA libraries. Where pip has no CPU build at hand, uv
# knows where PyTorch keeps its own.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then $(INSTALL) torch==$(TORCH); \
	else $(INSTALL) torch==$(TORCH)+cpu 2>/dev/null \
		|| { $(PIP) install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=cpu torch==$(TORCH); } \
		|| $(INSTALL) torch==$(TORCH); fi
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml deploy/constraints.txt
	$(INSTALL) -e '.[gateway,worker]'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(INSTALL) -e '.[gateway,worker,dev]'
	@# A torch for GPUs brings its own Triton; without one, the kernels' tests need its interpreter and compiler.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) triton==$(TRITON)
	@touch $@

# Libraries in one environment, commands in another: they pin each other's versions. The commands come without torch and
# its gigabytes; guidellm, whose data loader is torch's, sees the main environment's. uv takes seconds, pip minutes.
$(VENV)/clients/.ready: $(VENV)/.torch pyproject.toml tests/clients/tools.txt
	$(PYTHON) -m venv $(VENV)/clients
	$(PYTHON) -m venv --without-pip $(VENV)/clients/tools
	@CLIENTS=$(VENV)/clients; PIP="$$CLIENTS/bin/python -m pip --disable-pip-version-check"; \
	install() { env=$$1; shift; $$CLIENTS/bin/uv pip install --quiet --python $$env/bin/python "$$@" \
		|| $$PIP --python $$env/bin/python install --quiet "$$@"; }; \
	$$PIP install --quiet uv; install $$CLIENTS -e '.[gateway,clients]' \
		&& install $$CLIENTS/tools --no-deps -r tests/clients/tools.txt
	@MAIN=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		TOOLS=$$($(VENV)/clients/tools/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		echo "import site; site.addsitedir('$$MAIN')" > $$TOOLS/torch_of_main.pth
	@touch $@

tests/clients/node/node_modules/.ready: tests/clients/node/package-lock.json
	npm ci --prefix tests/clients/node --no-audit --no-fund
	@touch $@
