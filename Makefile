# make demo: train a small OPT, export it, write a sample.   make test: the tests.   make check: ruff, mypy, the house.
# make test-all: everything, also what takes long, in over an hour; as root with what CONTRIBUTING.md lists.
# make docs: the pages that are written from the configuration's comments.
# make test-slurm, make test-nodes: a Slurm of four nodes, and two hosts, made on this machine; both need root.
# make test-interop: TensorFlow's and Flax's OPT and ours, in an environment of its own.
# make test-gpu: what only a GPU shows, in four minutes; WHEELS=FOLDER takes the system's Python, see docs/gpu.md.
# make bench: our speed and the others', in one run.
# the Python to make environments with; unset: python3, or the one of an environment that is there
PYTHON ?=
BIN := .venv/bin
DEMO := runs/demo
# a folder of text to train the demo on instead of Python's own documentation
TEXT ?=
PROMPT ?= The function returns
# two processes, that is tensor parallelism, on CPUs or on two GPUs; a single GPU takes one process
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
PROCESSES := $(if $(filter 1,$(GPUS)),1,2)
export OMP_NUM_THREADS ?= $(if $(wildcard $(BIN)/python),$(shell $(BIN)/python -c "from opt_parallel.runtime.machine import cpus; print(max(1, cpus() // 2))"),1)

# what make bench trains, in bf16 where the device multiplies it, else in fp32: on a CPU a four-layer 125m, and with two threads the whole one
BENCH := $(BIN)/python scripts/benchmark.py
SMALL := model=opt-125m model.num_hidden_layers=4 data.sequence_length=512 batch.micro=2
LARGE := model=opt-1.3b data.sequence_length=2048 batch.micro=4
NO_DROPOUT := model.dropout=0 model.attention_dropout=0

.PHONY: demo test test-gpu test-slurm test-nodes test-interop test-all check matrix docs bench clean

ifneq ($(shell sh scripts/set_up.sh .venv "$(PYTHON)" --state),ready)
.PHONY: .venv/installed
endif
.venv/installed: pyproject.toml constraints.txt
	@sh scripts/set_up.sh .venv "$(PYTHON)" --constraint constraints.txt --editable ".[dev]"

demo: .venv/installed
	rm -rf $(DEMO)
ifneq ($(strip $(TEXT)),)
	$(BIN)/python scripts/demo_text.py --output cache/demo-text --source "$(TEXT)"
endif
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) train.py experiment=demo parallel.tensor=$(PROCESSES) \
		$(if $(strip $(TEXT)),data.train=cache/demo-text/train.jsonl data.validation=cache/demo-text/validation.jsonl)
	$(BIN)/python scripts/export.py --checkpoint $(DEMO)/checkpoints/step-600 --output $(DEMO)/export
	$(BIN)/python scripts/verify.py --checkpoint $(DEMO)/export
	$(BIN)/python scripts/generate.py --checkpoint $(DEMO)/export --prompt "$(PROMPT)" --temperature 0.7 --top-p 0.9

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# these start clusters on this machine, and would share its cores with the other tests
CLUSTERS := tests/launching/test_nodes.py tests/launching/test_slurm.py

test-all: .venv/installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --long --all-pairs $(CLUSTERS:%=--ignore=%)
	$(MAKE) test-nodes
	$(MAKE) test-slurm
	$(MAKE) test-interop

# the device of make test-gpu: cuda, or cpu for what a CPU can check of it
DEVICE ?= cuda
ifeq ($(strip $(WHEELS)),)
test-gpu: .venv/installed
	$(BIN)/python tests/gpu/run.py --device $(DEVICE)
else
test-gpu:
	$(or $(PYTHON),python3) tests/gpu/run.py --device $(DEVICE) --wheels "$(WHEELS)"
endif

test-slurm: .venv/installed
	$(BIN)/python -m pytest --long tests/launching/test_slurm.py

test-nodes: .venv/installed
	$(BIN)/python -m pytest --long tests/launching/test_nodes.py

ifneq ($(shell sh scripts/set_up.sh .venv-interop "$(PYTHON)" --state),ready)
.PHONY: .venv-interop/installed
endif
.venv-interop/installed: tests/interop/requirements.txt
	@sh scripts/set_up.sh .venv-interop "$(PYTHON)" --requirement $<

test-interop: .venv-interop/installed
	PYTHONPATH=. .venv-interop/bin/python -m pytest tests/interop

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py tests/test_docker.py

# docs/matrix.md, from a run of all tests, long ones included
matrix: .venv/installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --long --matrix

docs: .venv/installed
	$(BIN)/python scripts/reference.py

bench: .venv/installed
	$(BENCH) loss --words 25136 50272 --tokens 1024
	$(BENCH) host --tensor 2
	$(BENCH) generate model=opt-125m
	$(BENCH) io model=opt-1.3b parallel.tensor=2 precision=bf16
	$(BENCH) checkpoint model=opt-125m precision=fp32
ifeq ($(GPUS),0)
	$(BENCH) train --processes 2 --threads 1 --name tensor-2 $(SMALL) parallel.tensor=2 $(NO_DROPOUT)
	$(BENCH) train --processes 2 --threads 1 --name tensor-2-dropout $(SMALL) parallel.tensor=2
	$(BENCH) train --processes 2 --threads 1 --name data-2 $(SMALL) $(NO_DROPOUT)
	$(BENCH) train --processes 2 --threads 1 --name data-2-dropout $(SMALL)
	$(BENCH) train --processes 1 --threads 2 --name one-process $(SMALL) model.num_hidden_layers=12 $(NO_DROPOUT)
else
	$(BENCH) train --processes $(PROCESSES) --name gpu $(LARGE) parallel.tensor=$(PROCESSES) $(NO_DROPOUT)
	$(BENCH) train --processes $(PROCESSES) --name gpu-dropout $(LARGE) parallel.tensor=$(PROCESSES)
endif

clean:
	rm -rf .venv .venv-interop runs cache
