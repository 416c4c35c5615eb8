"""The command `opt-parallel`, or `python -m opt_parallel`. Only the modules of the command that runs are imported."""

from __future__ import annotations

import sys
from importlib import import_module

import opt_parallel

COMMANDS = {
    "train": "train a model, or continue a run",
    "prepare": "prepare the text of a run in advance",
    "preflight": "check hosts, devices, network and disks before a long run",
    "plan": "plan memory, speed and cost of a run on a cluster, without a GPU",
    "submit": "start a run by torchrun, Slurm, Kubernetes, DeepSpeed or accelerate",
    "evaluate": "compute the loss or a classifier's metrics on held-out text",
    "generate": "continue prompts",
    "export": "write a checkpoint as a Hugging Face folder",
    "verify": "compare a Hugging Face folder with transformers",
    "checkpoint": "list, show, verify and compare training checkpoints",
    "compare": "plot and tabulate several runs",
    "tokenizer": "train a tokenizer",
    "benchmark": "measure speed and memory, also of other trainers",
}
HELP = f"""\
opt-parallel COMMAND …    train OPT language models with tensor parallelism and ZeRO

{"".join(f"  {name:<11} {meaning}{chr(10)}" for name, meaning in COMMANDS.items())}
`opt-parallel COMMAND --help` explains a command. To begin:

  opt-parallel train model=opt-tiny                       train a small model on Python's own documentation
  opt-parallel train model=opt-tiny debug=one-batch       one step of training, validation, saving and export
  torchrun --standalone --nproc-per-node 8 -m opt_parallel train model=opt-1.3b parallel.tensor=2 data.train=/data/text

Options:

  --version                          the version
  --shell-completion bash|zsh|fish   the script that completes commands, options and keys in a shell
"""


def main() -> None:
    """Run the command that `sys.argv` names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif words[0] == "--version":
        print(f"opt-parallel {opt_parallel.__version__}")
    elif words[0] in COMMANDS:
        sys.argv = [f"opt-parallel {words[0]}", *words[1:]]
        import_module(f"opt_parallel.commands.{words[0]}").run()
    elif words[0] in ("--shell-completion", "--complete"):
        from opt_parallel.completion import answer

        answer(words, COMMANDS)
    else:
        refuse(words[0])


def refuse(word: str) -> None:
    """End with one line about a word that is not a command."""
    from difflib import get_close_matches

    from opt_parallel.config.secrets import masked
    from opt_parallel.runtime.errors import UserError, reporting

    close = get_close_matches(word, COMMANDS, n=1)
    with reporting():
        raise UserError(
            f"{masked(word)} is not a command: "
            + (f"did you mean opt-parallel {close[0]}?" if close else "opt-parallel --help lists the commands"),
            shared=True,
        )


if __name__ == "__main__":
    main()
