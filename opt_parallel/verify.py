"""Do transformers and we compute the same, and from the same weights?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opt_parallel.checkpoint.reading import Opened, open_checkpoint
from opt_parallel.checkpoint.writing import CHECKSUMS, checksum
from opt_parallel.errors import UserError, one_line
from opt_parallel.hf_config import CONFIG
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.hf import to_hf
from opt_parallel.model.opt import Decoder
from opt_parallel.parallel.shard import Source, fill, logical_shapes, marked
from opt_parallel.shapes import MAY_DIFFER
from opt_parallel.storage.foreign import file_in, read_json
from opt_parallel.topology import ALONE, Group, Topology

TOLERANCE = 1e-5  # of the largest output: fp32 carries 7 digits, some are lost to sums in another order
LENGTH, PADDING = 32, 5


class _Base(nn.Module):
    """The decoder under the name that it has below a head."""

    def __init__(self, opened: Opened, group: Group) -> None:
        super().__init__()
        self.decoder = Decoder(opened.config, group)

    def forward(self, ids: Tensor, segments: Tensor | None) -> Tensor:
        hidden = self.decoder(ids, segments=segments)
        assert isinstance(hidden, Tensor)
        return hidden


@dataclass(frozen=True)
class Kind:
    """One of transformers' classes: our counterpart (of a checkpoint, its number of labels and a group), and the field
    of its output that is compared."""

    build: Callable[[Opened, int, Group], nn.Module]
    output: str


KINDS = {
    "OPTForCausalLM": Kind(lambda opened, labels, group: CausalLM(opened.config, group), "logits"),
    "OPTModel": Kind(lambda opened, labels, group: _Base(opened, group), "last_hidden_state"),
    "OPTForSequenceClassification": Kind(
        lambda opened, labels, group: SequenceClassifier(opened.config, labels, group), "logits"
    ),
}


@dataclass
class Verdict:
    """`differences`: the largest one of the outputs for each kind of padding; `limit`: up to where they agree;
    `findings`: what else is wrong, a line each."""

    differences: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return not self.findings and all(difference <= self.limit for difference in self.differences.values())


def verify(folder: Path, against: Path | None = None, tensor: int = 1) -> Verdict | None:
    """Compare the outputs of transformers on `folder` with ours on `against` (None: on `folder`), in fp32 on random
    ids; then each parameter, bit by bit, and the folder's bytes with its checksums.

    Ours may be split over `tensor` processes. The verdict is the main one's, None elsewhere.

    Raises: UserError if `folder` is no Hugging Face folder, or transformers is missing.
    """
    opened = open_checkpoint(folder)
    judged = opened if against is None else open_checkpoint(against, "--against ")
    if not (opened.folder / CONFIG).is_file():
        raise UserError(f"--checkpoint {folder} is not what transformers reads: export it first (scripts/export.py)")
    labels = len(opened.labels.names)
    transformers = _transformers()
    opened.config.check_splits(tensor, "--tensor ")
    if other := _other_network(opened, judged):
        return Verdict(findings=other)  # outputs that nobody would compare
    described = transformers.AutoConfig.from_pretrained(opened.folder)
    architecture = (described.architectures or ["OPTForCausalLM"])[0]
    if architecture not in KINDS:
        raise UserError(f"{opened.folder / CONFIG}: architectures is {architecture}, not one of {', '.join(KINDS)}")
    kind = KINDS[architecture]
    with torch.device("meta"):
        empty = kind.build(judged, labels, ALONE)
    missing = _other_tensors(judged, empty)
    if missing and against is not None:
        raise UserError(missing[0])
    if missing:
        return Verdict(findings=missing)
    source = _as_stored(judged, opened, empty)
    inputs = _inputs(opened)

    with Topology.open(tensor) as topology, torch.no_grad():
        with torch.device("meta"):
            model = kind.build(judged, labels, topology.tensor)
        fill(model, source, torch.device("cpu"), torch.float32)
        judged.warn_of_not_finite(topology.tensor)
        ours = {name: model(ids, segments=mask) for name, (ids, mask) in inputs.items()}
        del model  # before theirs comes: one whole model in memory at a time
        if not topology.is_main:
            return None
    theirs, report = getattr(transformers, architecture).from_pretrained(
        opened.folder, dtype=torch.float32, output_loading_info=True
    )
    verdict = _compare(ours, theirs.eval(), inputs, kind.output)
    verdict.findings += [f"transformers has {what}: {name}" for what, names in report.items() for name in names]
    verdict.findings += _wrong_checksums(opened.folder)
    verdict.findings += _other_parameters(theirs, empty, source, opened.config.num_attention_heads)
    return verdict


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("verification needs transformers: pip install 'opt-parallel[dev]'") from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it has to report stands in the verdict
    return transformers


def _other_network(opened: Opened, judged: Opened) -> list[str]:
    """Where the two checkpoints' networks differ in more than how they are trained."""
    names = ["embedding_size", "has_final_layer_norm", *(each.name for each in fields(opened.config))]
    here = {name: getattr(opened.config, name) for name in names}
    there = {name: getattr(judged.config, name) for name in names}
    derived = {"word_embed_proj_dim", "remove_final_layer_norm"}
    return [
        f"{CONFIG} describes a network with {name}={here[name]}, --against one with {there[name]}"
        for name in names
        if name not in MAY_DIFFER | derived and here[name] != there[name]
    ]


def _other_tensors(opened: Opened, model: nn.Module) -> list[str]:
    """Why the files are not those of `model`; nothing if they are."""
    try:
        opened.stored.check(logical_shapes(model))
    except UserError as error:
        return [str(error)]
    return []


def _as_stored(judged: Opened, opened: Opened, model: nn.Module) -> Source:
    """`judged`'s weights in the dtype of `opened`'s: an export to bfloat16 is judged by what it can hold."""
    held = [(shard.numel, name, shard) for name, _, shard in marked(model) if opened.stored.holds(name)]
    _, name, shard = min(held, key=lambda each: each[0])
    dtype = opened.stored(name, shard).dtype
    return lambda name, shard: judged.weights(name, shard).to(dtype)


def _inputs(opened: Opened) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Random ids (2, S) with masks that hide the start, the end or a stretch of one row, or nothing."""
    length = min(LENGTH, opened.config.max_position_embeddings)
    ids = torch.randint(opened.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, tuple[Tensor, Tensor | None]] = {"unpadded": (ids, None)}
    padding = min(PADDING, length // 3)
    hidden = {"left": slice(0, padding), "right": slice(length - padding, None), "inner": slice(padding, 2 * padding)}
    for name, part in hidden.items():
        mask = torch.ones_like(ids)
        mask[0, part] = 0
        inputs[f"{name}-padded"] = (ids.masked_fill(mask == 0, opened.config.pad_token_id), mask)
    return inputs


@torch.no_grad()
def _compare(
    ours: dict[str, Tensor], theirs: nn.Module, inputs: dict[str, tuple[Tensor, Tensor | None]], output: str
) -> Verdict:
    """The outputs, less padded positions."""
    verdict = Verdict()
    for name, (ids, mask) in inputs.items():
        expected = getattr(theirs(input_ids=ids, attention_mask=mask), output)
        difference = (ours[name] - expected).abs()
        if mask is not None and difference.dim() == 3:
            difference = difference[mask.bool()]
        verdict.differences[name] = float(difference.max())
        verdict.limit = max(verdict.limit, TOLERANCE * float(expected.abs().max()))
    return verdict


def _wrong_checksums(folder: Path) -> list[str]:
    """The tensors whose bytes are not those that were exported; nothing where nobody wrote down checksums."""
    path = file_in(folder, CHECKSUMS)
    if path is None:
        return []
    try:
        written: dict[str, str] = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        return [f"{CHECKSUMS} cannot be read ({one_line(error)})"]
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file_in(folder, path.name)
        with safe_open(path, framework="pt") as file:
            found |= {name: checksum(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    names = {total: name for name, total in written.items()}
    wrong = [name for name in sorted(written.keys() | found.keys()) if written.get(name) != found.get(name)]
    return [f"{name}: not the bytes of {CHECKSUMS}{_belonging_to(names.get(found.get(name, '')))}" for name in wrong]


def _belonging_to(name: str | None) -> str:
    return "" if name is None else f", but those of {name}"


@torch.no_grad()
def _other_parameters(theirs: nn.Module, empty: nn.Module, source: Source, heads: int) -> list[str]:
    """Which of transformers' parameters are not bit by bit what `source` has, by how much, and what they look like."""
    loaded = dict(theirs.named_parameters())  # a tied head is not among them
    sums: dict[str, str] = {}  # of the source's tensors → their names
    differing: list[tuple[str, str, str]] = []
    for name, values in _their_tensors(empty, source):
        sums[checksum(values)] = name
        found = loaded.pop(name if name in loaded else name.removeprefix("model."), None)
        if found is None:
            differing.append((name, "transformers has no such parameter", ""))
        elif not bool((same := (found == values) | (found.isnan() & values.isnan())).all()):
            count, most = int((~same).sum()), float((found - values).abs().max())
            what = f"{count:,} of {same.numel():,} values differ, by {most:.1e} at most{_order(found, values, heads)}"
            differing.append((name, what, checksum(found.to(values.dtype))))
    findings = [f"{name}: {what}{_belonging_to(sums.get(total))}" for name, what, total in differing]
    return findings + [f"{name}: a parameter that only transformers has" for name in loaded]


def _their_tensors(empty: nn.Module, source: Source) -> Iterator[tuple[str, Tensor]]:
    for name, _, shard in marked(empty):
        yield from to_hf(name, source(name, shard)).items()


def _order(found: Tensor, values: Tensor, heads: int) -> str:
    """Says so where `found` is `values` with its heads, equal parts along one dim, in another order."""
    for dim in range(values.dim()):
        if values.size(dim) % heads == 0:
            here, there = ([checksum(part) for part in each.to(values.dtype).chunk(heads, dim)]
                           for each in (found, values))  # fmt: skip
            if here != there and sorted(here) == sorted(there):
                return f"; heads along dim {dim} stand in the order {' '.join(str(there.index(part)) for part in here)}"
    return ""
