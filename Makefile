# make demo: train a small OPT on two processes, export it, write a sample.   make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
TEXT ?=                      # a folder of text to train the demo on instead of Python's own documentation
PROMPT ?= The function returns

.PHONY: demo test check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO) cache/demo-text
	$(BIN)/python scripts/demo_text.py --output cache/demo-text $(if $(strip $(TEXT)),--source $(strip $(TEXT)))
	$(BIN)/torchrun --standalone --nproc-per-node 2 train.py experiment=demo
	$(BIN)/python scripts/export.py --checkpoint $$(ls -d $(DEMO)/checkpoints/step-* | sort -t- -k2 -n | tail -n 1) --output $(DEMO)/export
	$(BIN)/python scripts/verify.py --checkpoint $(DEMO)/export
	$(BIN)/python scripts/generate.py --checkpoint $(DEMO)/export --prompt "$(PROMPT)"

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

clean:
	rm -rf $(VENV) runs cache
