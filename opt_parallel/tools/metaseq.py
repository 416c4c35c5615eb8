"""Describe a metaseq checkpoint, and read all its values. No process group is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.metaseq.archive import wrong_records
from opt_parallel.metaseq.findings import listed, warnings_of
from opt_parallel.metaseq.weights import MetaseqWeights
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import marked
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import aligned, bytes_in_words
from opt_parallel.tools.progress import shown

DEGREES = (1, 2, 4, 8, 16)  # tensor degrees for which the bytes of a rank are shown
DISK = 2 * 10**9  # bytes per second of the disk for which the time to load is shown


def odd_values(folder: Path, md5: Path | None) -> list[str]:
    """Read all values of a metaseq checkpoint, one tensor at a time, after its files are compared with the list `md5`,
    or else with the checksums that they store.

    Returns one line for each kind of odd values. Raises: UserError if the checkpoint is damaged."""
    opened, weights = _opened(folder)
    opened.check_md5("--md5 ", md5)
    lines = [] if md5 else _wrong_files(weights)
    with torch.device("meta"):
        parameters = [(name, shard) for name, _, shard in marked(CausalLM(opened.config, ALONE))]
    with shown("verify", weights, sum(shard.numel for _, shard in parameters)) as source:
        for name, shard in parameters:
            source(name, shard)
    return lines + warnings_of(folder, [weights.findings])


def _wrong_files(weights: MetaseqWeights) -> list[str]:
    """A line if files of a checkpoint have records that are not what was stored. NumPy files have no checksums."""
    files = [path for path in weights.described.files if path.suffix.lower() == ".pt"]
    wrong = {path.name: wrong_records(path) for path in tqdm(files, "verify", unit=" files", leave=False, disable=None)}
    named = [f"{name} ({', '.join(records[:5])})" for name, records in wrong.items() if records]
    if not named:
        return []
    what = f"has files with wrong bytes, as the checksums in them show: {listed(named)}"
    return [f"warning: {weights.folder} {what}: copy them again"]


def described(folder: Path) -> str:
    """The form, the network and the tensors of a metaseq checkpoint, and the bytes that a rank reads, as text.

    Raises: UserError if the checkpoint is damaged."""
    opened, weights = _opened(folder)
    known, config = weights.described, opened.config
    size = sum(path.stat().st_size for path in known.files)
    with torch.device("meta"):
        network = CausalLM(config, ALONE)
    facts = [
        ["form", known.form],
        ["files", f"{len(known.files):,}, {bytes_in_words(size)}"],
        ["network", f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} "
                    f"heads, {config.vocab_size} tokens, {config.max_position_embeddings} positions"],
        ["parameters", f"{sum(shard.numel for _, _, shard in marked(network)):,}"],
        ["dtype", ", ".join(sorted(known.dtypes))],
    ]  # fmt: skip
    lines = [["tensor degree", "bytes a rank reads", f"minutes for a tensor group at {bytes_in_words(DISK)}/s"]]
    for degree in DEGREES:
        try:
            config.check_splits(degree, "")
        except UserError:
            continue
        held = bytes_of_rank(opened, degree)
        lines.append([str(degree), bytes_in_words(held), f"{degree * held / DISK / 60:.1f}"])
    return f"{aligned(facts)}\n\n{aligned(lines)}"


def bytes_of_rank(opened: Opened, degree: int) -> int:
    """The bytes of the weights that the first rank of a tensor group holds, in the checkpoint's dtype."""
    with torch.device("meta"):
        model = CausalLM(opened.config, Group(None, 0, degree))
    return sum(tensor.numel() * opened.stored.dtype.itemsize for _, tensor, _ in marked(model))


def _opened(folder: Path) -> tuple[Opened, MetaseqWeights]:
    opened = open_checkpoint(folder)
    assert opened.metaseq is not None
    opened.check_language_model()
    return opened, opened.metaseq
