"""Verify an export by checking that transformers and this package compute the same outputs from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opt_parallel.checkpoint.memory import require_memory
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

TOLERANCE = 1e-5  # relative to the largest output; fp32 has 7 digits, of which different orders of summation lose some
LENGTH, PADDING = 32, 5
COPIES = 3  # Approximate number of fp32 copies of the largest tensor in memory during the comparison.
KINDS_OF_PADDING = ("unpadded", "left-padded", "right-padded", "inner-padded")  # Two input rows of each kind.


class _Base(nn.Module):
    """The decoder without a head, under the attribute name that a model with a head uses for it."""

    def __init__(self, opened: Opened, group: Group) -> None:
        super().__init__()
        self.decoder = Decoder(opened.config, group)

    def forward(self, ids: Tensor, segments: Tensor | None) -> Tensor:
        hidden = self.decoder(ids, segments=segments)
        assert isinstance(hidden, Tensor)
        return hidden


@dataclass(frozen=True)
class Kind:
    """How to compare one of transformers' model classes. `build` constructs our model of this class from a checkpoint,
    its number of labels and a tensor group. `output` is the field of transformers' output to compare."""

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
    """The result of a verification. `differences` holds the largest difference of the outputs for each kind of padding.
    `limit` is the largest difference that passes. `findings` lists all other faults, one line each."""

    differences: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return not self.findings and all(difference <= self.limit for difference in self.differences.values())


def verify(folder: Path, against: Path | None = None, tensor: int = 1) -> Verdict | None:
    """Compare transformers' outputs for the checkpoint `folder` with ours for `against` (by default also `folder`), in
    fp32 on random token ids. Then compare each parameter bit by bit, and the folder's files with their checksums.

    Our model may be split over `tensor` processes. Rank 0 returns the verdict, and all other ranks return None.

    Raises: UserError if `folder` is not a Hugging Face folder, or transformers is missing.
    """
    opened = open_checkpoint(folder)
    reference = opened if against is None else open_checkpoint(against, "--against ", checksums=True)
    if not (opened.folder / CONFIG).is_file():
        raise UserError(f"--checkpoint {folder} is not a Hugging Face folder: export it first (opt-parallel export)")
    labels = len(opened.labels.names)
    transformers = _transformers()
    opened.config.check_splits(tensor, "--tensor ")
    if other := _other_network(opened, reference):
        return Verdict(findings=other)  # different networks have different outputs
    described = transformers.AutoConfig.from_pretrained(opened.folder)
    architecture = (described.architectures or ["OPTForCausalLM"])[0]
    if architecture not in KINDS:
        raise UserError(f"{opened.folder / CONFIG}: architectures is {architecture}, not one of {', '.join(KINDS)}")
    kind = KINDS[architecture]
    with torch.device("meta"):
        empty = kind.build(reference, labels, ALONE)
    missing = _other_tensors(reference, empty)
    if missing and against is not None:
        raise UserError(missing[0])
    if missing:
        return Verdict(findings=missing)
    source = _as_stored(reference, opened)
    inputs = _inputs(opened)
    _require_memory(folder, empty)

    with Topology.open(tensor) as topology, torch.no_grad():
        with torch.device("meta"):
            model = kind.build(reference, labels, topology.tensor)
        with filled_in_turn(model, source, torch.device("cpu"), torch.float32):
            ours = [model(ids, segments=mask) for ids, mask in inputs]
        reference.warn_of_not_finite(topology.tensor)
        if not topology.is_main:
            return None
    theirs = _Theirs(getattr(transformers, architecture), opened.folder)
    verdict = Verdict() if theirs.report else _compare(ours, theirs.model, inputs, kind.output)
    verdict.findings += [*theirs.report, *wrong_tensors(opened.folder)]
    if not theirs.report:
        verdict.findings += _other_parameters(theirs, empty, source, opened.config.num_attention_heads)
    return verdict


def _require_memory(folder: Path, empty: nn.Module) -> None:
    """Raise UserError unless memory suffices for COPIES of the largest tensor, or for the full model if transformers
    cannot read the folder module by module."""
    sizes = [shard.numel for _, _, shard in marked(empty)]
    if _in_modules(folder):
        require_memory(
            f"{folder}: verifying its largest tensor", COPIES * 4 * max(sizes), "free memory, or raise the limit"
        )
    else:
        way_out = "export it first (opt-parallel export), since safetensors are read one layer at a time"
        require_memory(f"{folder}: transformers' full model in fp32", 4 * (sum(sizes) + COPIES * max(sizes)), way_out)


def _in_modules(folder: Path) -> bool:
    """Whether transformers can read the folder module by module. A PyTorch `.bin` file must be read as a whole."""
    return any(folder.glob("*.safetensors"))


class _Theirs:
    """A model of transformers' class `kind` in fp32. If the weights are safetensors, accelerate treats the model as
    offloaded to disk, so a module's weights are read from the files for its forward and freed afterwards.

    `report` lists missing and unexpected tensors. If the report is not empty, the model has no weights."""

    def __init__(self, kind: Any, folder: Path) -> None:
        in_modules = _in_modules(folder)
        self.model, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, device_map="meta" if in_modules else None
        )
        self.model.eval()
        self.names = [name for name, _ in self.model.named_parameters()]  # the tied output projection is not listed
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
            own = first.setdefault(parameter, name)  # A file stores a tied parameter under its first name.
            spellings = (own, prefix + own, own.removeprefix(prefix))  # Names in a model with and without a head.
            index[name] = next(stored[spelling] for spelling in spellings if spelling in stored)
        weights = OffloadedWeightsLoader(index=index)
        attach_align_device_hook(self.model, torch.device("cpu"), offload=True, weights_map=weights)

    def parameter(self, name: str) -> Tensor:
        """The values of a parameter."""
        from accelerate.utils import align_module_device

        prefix, _, own = name.rpartition(".")
        module = self.model.get_submodule(prefix)
        with align_module_device(module):
            return getattr(module, own).detach()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("verification needs transformers: pip install transformers") from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # transformers' warnings are part of the verdict
    return transformers


def _other_network(opened: Opened, reference: Opened) -> list[str]:
    """One line for each difference between the networks of two checkpoints, without settings that only training
    uses."""
    names = ["embedding_size", "has_final_layer_norm", *(each.name for each in fields(opened.config))]
    here = {name: getattr(opened.config, name) for name in names}
    there = {name: getattr(reference.config, name) for name in names}
    derived = {"word_embed_proj_dim", "remove_final_layer_norm"}
    return [
        f"{CONFIG} describes a network with {name}={here[name]}, but --against one with {there[name]}"
        for name in names
        if name not in MAY_DIFFER | derived and here[name] != there[name]
    ]


def _other_tensors(opened: Opened, model: nn.Module) -> list[str]:
    """A line that says why the tensors in the files are not those of `model`, or nothing if they are the same."""
    try:
        opened.stored.check(logical_shapes(model))
    except UserError as error:
        return [str(error)]
    return []


def _as_stored(reference: Opened, opened: Opened) -> Source:
    """The weights of `reference` in the dtype of `opened`, so that an export to bfloat16 is compared after rounding."""
    return lambda name, shard: reference.weights(name, shard).to(opened.dtype)


def _inputs(opened: Opened) -> list[tuple[Tensor, Tensor | None]]:
    """Random token ids (2, S) without a mask, and (6, S) with a mask that hides the start, the end or an inner part of
    every other row.

    The inputs are only two batches, because each forward reads all weights again."""
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
    """Compare both models' outputs at the positions that are not padding."""
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
    """One line for each parameter of transformers that differs from `source`, with the size of the difference, and with
    a note if attention heads or tensors are exchanged."""
    loaded = set(theirs.names)
    sums: dict[str, str] = {}  # maps checksums of the source's tensors to names
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
    return findings + [f"{name}: only transformers has this parameter" for name in sorted(loaded)]


def _their_tensors(empty: nn.Module, source: Source) -> Iterator[tuple[str, Tensor]]:
    for name, _, shard in marked(empty):
        yield from to_hf(name, source(name, shard)).items()


def _order(found: Tensor, values: Tensor, heads: int) -> str:
    """A message if `found` equals `values` with the attention heads along a dimension in another order, else an empty
    text."""
    for dim in range(values.dim()):
        if values.size(dim) % heads == 0:
            here, there = ([checksum(part) for part in each.to(values.dtype).chunk(heads, dim)]
                           for each in (found, values))  # fmt: skip
            if here != there and sorted(here) == sorted(there):
                return f"; heads along dim {dim} are in the order {' '.join(str(there.index(part)) for part in here)}"
    return ""
