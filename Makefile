# make demo: train a small OPT, export it, write a sample.   make test: the tests.   make check: ruff, mypy, the house.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# a folder of text to train the demo on instead of Python's own documentation
TEXT ?=
PROMPT ?= The function returns
# two processes, that is tensor parallelism, on CPUs or on two GPUs; a single GPU takes one process
PROCESSES := $(if $(filter 1,$(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)),1,2)
export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c "import os; print(max(1, os.cpu_count() // 2))")

.PHONY: demo test check clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	rm -rf $(DEMO)
ifneq ($(strip $(TEXT)),)
	$(BIN)/python scripts/demo_text.py --output cache/demo-text --source "$(TEXT)"
endif
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) train.py experiment=demo parallel.tensor=$(PROCESSES) \
		$(if $(strip $(TEXT)),data.train=cache/demo-text/train.jsonl data.validation=cache/demo-text/validation.jsonl)
	$(BIN)/python scripts/export.py --checkpoint $(DEMO)/checkpoints/step-600 --output $(DEMO)/export
	$(BIN)/python scripts/verify.py --checkpoint $(DEMO)/export
	$(BIN)/python scripts/generate.py --checkpoint $(DEMO)/export --prompt "$(PROMPT)"

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

clean:
	rm -rf .venv runs cache
