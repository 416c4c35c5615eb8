"""Continue a prompt: `python scripts/generate.py --checkpoint DIR --prompt TEXT`, or on several processes
`torchrun --nproc-per-node 2 scripts/generate.py --tensor 2 …`."""

from __future__ import annotations

import argparse
from pathlib import Path

from opt_parallel.errors import UserError, reporting
from opt_parallel.log import quiet_libraries, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="…/checkpoints/step-<N>, or a Hugging Face folder"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel degree")
    arguments = parser.parse_args()
    for name in ("max_new_tokens", "tensor"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    quiet_libraries()
    import torch

    from opt_parallel.checkpoint.reading import open_checkpoint
    from opt_parallel.data.tokens import load_tokenizer
    from opt_parallel.model.generation import greedy
    from opt_parallel.topology import Topology

    opened = open_checkpoint(arguments.checkpoint)
    if opened.config.num_attention_heads % arguments.tensor:
        raise UserError(f"--tensor {arguments.tensor} does not divide {opened.config.num_attention_heads} heads")
    tokenizer = load_tokenizer(str(opened.tokenizer))
    encoded = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    ids = torch.tensor([[opened.config.eos_token_id, *encoded]])  # OPT's prompts begin with </s>
    positions = opened.config.max_position_embeddings
    if ids.size(1) >= positions:
        raise UserError(f"--prompt has {ids.size(1)} tokens, the model {positions} positions; shorten it")
    with Topology.open(arguments.tensor) as topology:
        model = opened.model(topology.tensor, topology.device)
        output = greedy(model, ids.to(topology.device), arguments.max_new_tokens, opened.config.eos_token_id)
    say(tokenizer.decode(output[0].tolist()))


if __name__ == "__main__":
    with reporting():
        main()
