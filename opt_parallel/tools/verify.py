"""Do transformers and we compute the same, and from the same weights?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opt_parallel.checkpoint.room import require_room
from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.config.model import MAY_DIFFER
from opt_parallel.huggingface.config import CONFIG
from opt_parallel.huggingface.folder import belonging_to, checksum, wrong_tensors
from opt_parallel.huggingface.names import compare_values, to_hf
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.opt import Decoder
from opt_parallel.parallel.passing import filled_in_turn
from opt_parallel.parallel.shard import Source, logical_shapes, marked
from opt_parallel.parallel.topology import ALONE, Group, Topology
from opt_parallel.runtime.errors import UserError

TOLERANCE = 1e-5  # of the largest output: fp32 carries 7 digits, some are lost to sums in another order
LENGTH, PADDING = 32, 5
COPIES = 3  # of the largest tensor in fp32, more or less: as it was stored, ours and theirs, what compares them
KINDS_OF_PADDING = ("unpadded", "left-padded", "right-padded", "inner-padded")  # of the inputs, two rows each


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
    judged = opened if against is None else open_checkpoint(against, "--against ", checksums=True)
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
    source = _as_stored(judged, opened)
    inputs = _inputs(opened)
    _require_room(folder, empty)

    with Topology.open(tensor) as topology, torch.no_grad():
        with torch.device("meta"):
            model = kind.build(judged, labels, topology.tensor)
        with filled_in_turn(model, source, torch.device("cpu"), torch.float32):
            ours = [model(ids, segments=mask) for ids, mask in inputs]
        judged.warn_of_not_finite(topology.tensor)
        if not topology.is_main:
            return None
    theirs = _Theirs(getattr(transformers, architecture), opened.folder)
    verdict = Verdict() if theirs.report else _compare(ours, theirs.model, inputs, kind.output)
    verdict.findings += [*theirs.report, *wrong_tensors(opened.folder)]
    if not theirs.report:
        verdict.findings += _other_parameters(theirs, empty, source, opened.config.num_attention_heads)
    return verdict


def _require_room(folder: Path, empty: nn.Module) -> None:
    """Raise UserError unless there is memory for what is held at a time: the largest tensor, ours and theirs."""
    sizes = [shard.numel for _, _, shard in marked(empty)]
    if _in_modules(folder):
        require_room(
            f"{folder}: verifying its largest tensor", COPIES * 4 * max(sizes), "free some, or raise the limit"
        )
    else:
        way_out = "export it first (scripts/export.py): of safetensors one layer is read at a time"
        require_room(f"{folder}: transformers' whole model in fp32", 4 * (sum(sizes) + COPIES * max(sizes)), way_out)


def _in_modules(folder: Path) -> bool:
    """Whether transformers reads the folder module by module; of a PyTorch file it wants everything."""
    return any(folder.glob("*.safetensors"))


class _Theirs:
    """transformers' model of class `kind` in fp32. From safetensors accelerate gives it its weights as it does to a
    model that is offloaded to disk: a module's are read from the files where they lie when it computes, and let go when
    it has.

    `report`: what was missing or left over; if there is anything, it has no weights."""

    def __init__(self, kind: Any, folder: Path) -> None:
        in_modules = _in_modules(folder)
        self.model, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, device_map="meta" if in_modules else None
        )
        self.model.eval()
        self.names = [name for name, _ in self.model.named_parameters()]  # a tied head is not among them
        self.report = [f"transformers has {what}: {name}" for what, names in report.items() for name in names]
        if in_modules and not self.report:
            self._read_in_turn(folder)

    def _read_in_turn(self, folder: Path) -> None:
        from accelerate.hooks import attach_align_device_hook
        from accelerate.utils import OffloadedWeightsLoader

        stored: dict[str, dict[str, str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    stored[name] = {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"}
        first: dict[nn.Parameter, str] = {}
        prefix, index = f"{self.model.base_model_prefix}.", {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            own = first.setdefault(parameter, name)  # of a tied one what the file holds
            ways = (own, prefix + own, own.removeprefix(prefix))  # with and without a head
            index[name] = next(stored[way] for way in ways if way in stored)
        weights = OffloadedWeightsLoader(index=index)
        attach_align_device_hook(self.model, torch.device("cpu"), offload=True, weights_map=weights)

    def parameter(self, name: str) -> Tensor:
        """A parameter's values."""
        from accelerate.utils import align_module_device

        prefix, _, own = name.rpartition(".")
        module = self.model.get_submodule(prefix)
        with align_module_device(module):
            return getattr(module, own).detach()


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


def _as_stored(judged: Opened, opened: Opened) -> Source:
    """`judged`'s weights in the dtype of `opened`'s: an export to bfloat16 is judged by what it can hold."""
    return lambda name, shard: judged.weights(name, shard).to(opened.dtype)


def _inputs(opened: Opened) -> list[tuple[Tensor, Tensor | None]]:
    """Random ids (2, S) without a mask; and (6, S), whose masks hide the start, the end or a part of every other row.

    As few batches as there are kinds of mask: each forward reads all weights again."""
    length = min(LENGTH, opened.config.max_position_embeddings)
    ids = torch.randint(opened.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    padding = min(PADDING, length // 3)
    hidden = (slice(0, padding), slice(length - padding, None), slice(padding, 2 * padding))
    mask = torch.ones(2 * len(hidden), length, dtype=torch.long)
    for number, part in enumerate(hidden):
        mask[2 * number, part] = 0
    return [(ids, None), (ids.repeat(len(hidden), 1).masked_fill(mask == 0, opened.config.pad_token_id), mask)]


@torch.no_grad()
def _compare(ours: list[Tensor], theirs: nn.Module, inputs: list[tuple[Tensor, Tensor | None]], output: str) -> Verdict:
    """The outputs, less padded positions."""
    largest, limit = [], 0.0
    for mine, (ids, mask) in zip(ours, inputs, strict=True):
        expected = getattr(theirs(input_ids=ids, attention_mask=mask), output)
        difference = (mine - expected).abs()
        if mask is not None and mine.dim() == 3:
            difference = difference * mask.unsqueeze(-1)
        largest += [float(pair.max()) for pair in difference.split(2)]
        limit = max(limit, TOLERANCE * float(expected.abs().max()))
    return Verdict(dict(zip(KINDS_OF_PADDING, largest, strict=True)), limit)


@torch.no_grad()
def _other_parameters(theirs: _Theirs, empty: nn.Module, source: Source, heads: int) -> list[str]:
    """Which of transformers' parameters are not bit by bit what `source` has, by how much, and what they look like."""
    loaded = set(theirs.names)
    sums: dict[str, str] = {}  # of the source's tensors → their names
    wrong: list[tuple[str, str, str]] = []
    for name, values in _their_tensors(empty, source):
        sums[checksum(values)] = name
        their_name = name if name in loaded else name.removeprefix("model.")
        if their_name not in loaded:
            wrong.append((name, "transformers has no such parameter", ""))
            continue
        loaded.remove(their_name)
        found = theirs.parameter(their_name)
        count, most = compare_values(found, values)
        if count:
            what = f"{count:,} of {found.numel():,} values differ, by {most:.1e} at most{_order(found, values, heads)}"
            wrong.append((name, what, checksum(found.to(values.dtype))))
    findings = [f"{name}: {what}{belonging_to(sums.get(total))}" for name, what, total in wrong]
    return findings + [f"{name}: a parameter that only transformers has" for name in sorted(loaded)]


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
