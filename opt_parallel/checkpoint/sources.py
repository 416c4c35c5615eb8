"""Opens a checkpoint, which may be a training checkpoint, a Hugging Face folder, a hub id or a metaseq checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opt_parallel.checkpoint.damage import check_sizes, open_checked
from opt_parallel.checkpoint.grown import Grown
from opt_parallel.checkpoint.inherit import labels_at, model_at
from opt_parallel.checkpoint.lora import Base, Merged, Weights, lora_of
from opt_parallel.checkpoint.manifest import MANIFEST, Damaged, read_manifest
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.config.data import SpecialTokens
from opt_parallel.config.model import Labels, ModelConfig
from opt_parallel.huggingface.config import read_labels
from opt_parallel.huggingface.folder import CHECKSUMS, wrong_tensors
from opt_parallel.huggingface.hub import WEIGHTS as FORMATS
from opt_parallel.huggingface.hub import find_checkpoint
from opt_parallel.huggingface.names import HuggingFaceWeights
from opt_parallel.metaseq.files import is_metaseq
from opt_parallel.metaseq.findings import warnings_of
from opt_parallel.metaseq.folder import describe
from opt_parallel.metaseq.md5 import check_md5
from opt_parallel.metaseq.weights import MetaseqWeights
from opt_parallel.model.heads import SCORE, CausalLM, SequenceClassifier
from opt_parallel.parallel.shard import Shard, Source, fill, logical_shapes, random_source
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say


@dataclass(frozen=True)
class Opened:
    """An open checkpoint: the configuration of its network, a source of its weights, and its tokenizer's folder.

    The folder may contain no tokenizer."""

    config: ModelConfig
    stored: Weights
    tokenizer: Path
    folder: Path
    not_finite: list[str] = field(default_factory=list)  # tensors in which this rank has read NaN or infinity
    metaseq: MetaseqWeights | None = None  # the weights, if `folder` is a metaseq checkpoint

    @property
    def labels(self) -> Labels:
        """The labels of a classifier. A language model has the default labels of transformers."""
        if (self.folder / MANIFEST).is_file():
            return labels_at(self.folder) or Labels.numbered(2)
        return Labels.numbered(2) if self.metaseq else read_labels(self.folder)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest of the dtypes fp32, bf16 and fp16 that represents the weights exactly.

        Training checkpoints contain fp32 weights, also those of bf16 runs. Weights in fp64 are rounded to fp32."""
        return torch.float32 if self.stored.dtype is torch.float64 else self.stored.dtype

    @property
    def special_tokens(self) -> SpecialTokens:
        """How training encoded the spelling of a special token in a text, which is as text by default."""
        data = read_manifest(self.folder)["config"]["data"] if (self.folder / MANIFEST).is_file() else {}
        name = str(data.get("special_tokens", SpecialTokens.text.name))
        if name not in SpecialTokens.__members__:
            raise Damaged(self.folder, f"{MANIFEST} says data.special_tokens={name!r:.80}")
        return SpecialTokens[name]

    @property
    def is_classifier(self) -> bool:
        """Whether the checkpoint has a classification head."""
        return self.stored.holds(SCORE)

    def weights(self, name: str, shard: Shard) -> Tensor:
        """The elements `shard.range` of the full tensor `name`. Raises: UserError if a file is damaged."""
        values = self.stored(name, shard)
        if self.metaseq:
            wrong = (name, shard.index) in self.metaseq.findings.not_finite
        else:
            wrong = values.numel() > 0 and not all(bool(end.isfinite()) for end in values.aminmax())  # NaN: both are
        if wrong:
            self.not_finite.append(name)
        return values

    def grown(self, rows: int) -> Opened:
        """The checkpoint with `rows` rows in its embedding. A note is printed if this adds rows."""
        if rows == self.config.vocab_size:
            return self
        say(
            f"{self.folder}: the embedding grows from {self.config.vocab_size} rows to model.vocab_size={rows}; each "
            "new row is the mean of the old rows"
        )
        stored = Grown(self.stored, self.config.vocab_size)
        return replace(self, config=replace(self.config, vocab_size=rows), stored=stored)

    def as_base(self, name: str) -> Base:
        """This checkpoint as the base of a LoRA run, with the `name` that the user gives it.

        The checkpoint may be a classifier. Raises: UserError unless the checkpoint contains exactly the tensors of a
        network."""
        self.check_classifier()
        return Base.of(name, self.config, self.stored)

    def check_language_model(self) -> None:
        """Raise UserError unless the checkpoint contains exactly the tensors of a language model.

        No values are read."""
        if self.is_classifier:
            raise UserError(
                f"{self.folder} is a classifier ({SCORE} is unexpected), not a language model: choose another "
                "checkpoint, or set task=classify to train or evaluate this one"
            )
        with torch.device("meta"):
            self.stored.check(logical_shapes(CausalLM(self.config, ALONE)))

    def check_classifier(self) -> None:
        """Raise UserError unless the checkpoint contains exactly the tensors of a classifier or of a language model.

        A classification head can be added to a language model. No values are read."""
        with torch.device("meta"):
            wanted = logical_shapes(CausalLM(self.config, ALONE))
        if self.is_classifier:
            wanted[SCORE] = (len(self.labels.names), self.config.embedding_size)
        self.stored.check(wanted)

    def check_labels(self, labels: Labels) -> None:
        """Raise UserError if the classification head does not fit `labels`. Print a note if there is no head."""
        names, number = self.labels.names, len(labels.names)
        if not self.is_classifier:
            say(f"{self.folder} has no classification head: a new head for {number} labels is trained")
        elif len(names) != number:
            raise UserError(
                f"{self.folder} has {len(names)} labels ({', '.join(names[:5])}), but the run has {number} "
                f"({', '.join(labels.names[:5])}): set task.labels, or start from a language model"
            )

    def check_md5(self, key: str, name: str | Path | None) -> None:
        """Raise UserError unless the files of a metaseq checkpoint have the MD5 sums in the list `name`, if it is set.

        Every process reads its share of the files. `key` is the key or option that set `name`, for messages."""
        if name is None:
            return
        if self.metaseq is None:
            raise UserError(f"{key}{name}: {self.folder} is not a metaseq checkpoint, whose files the list names")
        check_md5(self.metaseq.described, key, name)

    def model(self, group: Group, device: torch.device, dtype: torch.dtype = torch.float32) -> CausalLM:
        """This rank's part of the language model. Raises: UserError."""
        self.config.check_splits(group.size, "tensor degree ")
        self.check_language_model()
        with torch.device("meta"):
            model = CausalLM(self.config, group)
        self.fill(model, self.weights, group, device, dtype)
        return model.eval()

    def classifier(
        self,
        num_labels: int,
        group: Group,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        new_head: bool = False,
        seed: int = 1,
    ) -> SequenceClassifier:
        """This rank's part of the classifier. Raises: UserError.

        With `new_head`, the checkpoint may be a language model, whose classification head is randomly initialised with
        `seed`."""
        self.config.check_splits(group.size, "tensor degree ")
        with torch.device("meta"):
            model = SequenceClassifier(self.config, num_labels, group)
        source = self.with_head(logical_shapes(model), seed) if new_head else self.weights
        if not new_head:
            self.stored.check(logical_shapes(model))
        self.fill(model, source, group, device, dtype)
        return model.eval()

    def with_head(self, wanted: dict[str, tuple[int, ...]], seed: int, replaced: bool = False) -> Source:
        """A source of the tensors `wanted` of a classifier. Raises: UserError for any other tensors.

        If the checkpoint has no classification head, the head is randomly initialised with `seed`, and a note is
        printed. If `replaced` is true, a random head also replaces a head with another number of labels."""
        wanted = dict(wanted)
        rows = len(self.labels.names) if self.is_classifier else 0
        if rows == wanted[SCORE][0] or (rows and not replaced):
            self.stored.check(wanted)
            return self.weights
        if rows:
            why, number = f"has a head for {rows} labels", wanted[SCORE][0]
            wanted[SCORE] = (rows, *wanted[SCORE][1:])
        else:
            why, number = "has no classification head", wanted.pop(SCORE)[0]
        self.stored.check(wanted)
        say(f"{self.folder} {why}: a head for {number} labels is randomly initialised with seed {seed}")
        return with_new_head(self.weights, seed)

    def warn_of_not_finite(self, group: Group) -> None:
        """Warn of NaN and infinity in the tensors that the ranks of `group` have read, and of other odd values in a
        metaseq checkpoint.

        All ranks of the group must call this method."""
        findings = self.metaseq.findings if self.metaseq else None
        found = [(self.not_finite, findings)]
        if group.size > 1:
            found = [([], None)] * group.size
            dist.all_gather_object(found, (self.not_finite, findings), group=group.handle)
        if self.metaseq:
            for line in warnings_of(self.folder, [each for _, each in found if each]):
                say(line)
            return
        names = sorted({name for part, _ in found for name in part})
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            say(f"warning: {self.folder} has values that are not finite, in {', '.join(names[:5])}{more}")

    def fill(self, model: nn.Module, source: Source, group: Group, device: torch.device, dtype: torch.dtype) -> None:
        """Allocate a model on the meta device, and read its weights from `source`.

        A warning is printed if a value is NaN or infinity. `source` must use the weights of this checkpoint."""
        self.not_finite.clear()
        if self.metaseq:
            self.metaseq.findings.clear()
        fill(model, source, device, dtype)
        self.warn_of_not_finite(group)


def with_new_head(weights: Source, seed: int) -> Source:
    """A source of `weights` and of a randomly initialised classification head, which the weights do not contain."""
    drawn = random_source(seed)

    def source(name: str, shard: Shard) -> Tensor:
        return drawn(name, shard) if name == SCORE else weights(name, shard)

    return source


def open_checkpoint(
    checkpoint: str | Path, key: str = "--checkpoint ", checksums: bool = False, above: tuple[Path, ...] = ()
) -> Opened:
    """Open a training checkpoint `checkpoints/step-<N>`, a Hugging Face folder, a hub id, or a metaseq checkpoint.

    The checkpoint of a LoRA run is opened together with its base, and its weights are merged.

    Args:
        key: the start of error messages.
        checksums: whether to verify all checksums first. Damage of a training checkpoint is an error, and each process
            verifies a share of the files. Damage of an exported folder is a warning, because users may change it.
        above: the LoRA checkpoints whose base is opened.

    Raises: UserError if `checkpoint` does not exist, is not an OPT model, lacks a file or is damaged, or if the base of
        a LoRA run is missing or has changed."""
    folder = find_checkpoint(checkpoint, key)
    return open_folder(folder, model_at(folder, key), checksums, above)


def open_folder(
    folder: Path,
    config: ModelConfig,
    checksums: bool = False,
    above: tuple[Path, ...] = (),
    formats: tuple[str, ...] = FORMATS,
) -> Opened:
    """Open the checkpoint in a local folder, whose network is `config`; see `open_checkpoint`.

    `formats` are the allowed formats of the weights in a Hugging Face folder."""
    if not (folder / MANIFEST).is_file() and is_metaseq(folder):
        metaseq = MetaseqWeights(describe(folder))
        return Opened(config, metaseq, folder, folder, metaseq=metaseq)
    if not (folder / MANIFEST).is_file():
        weights = HuggingFaceWeights(folder, formats)
        weights.check_layers(config.num_hidden_layers)
        if checksums and process.is_main() and (wrong := wrong_tensors(folder)):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            say(
                f"warning: {folder}, {wrong[0]}{more}: if the folder is damaged, export or copy it again; if it was "
                f"changed on purpose, remove {CHECKSUMS}"
            )
        return Opened(config, weights, folder, folder)
    reader = open_checked(folder) if checksums else CheckpointReader(folder)
    check_sizes(reader)
    stored = _with_base(reader, checksums, above) if reader.manifest.get("base") else reader
    return Opened(config, stored, folder / "tokenizer", folder)


def _with_base(reader: CheckpointReader, checksums: bool, above: tuple[Path, ...]) -> Merged:
    saved, here = Base(**reader.manifest["base"]), reader.folder.resolve()
    if here in above:
        raise Damaged(reader.folder, f"{MANIFEST} names the checkpoint itself as its base")
    key = f"{reader.folder} belongs to a LoRA run and needs its base: "
    opened = open_checkpoint(saved.checkpoint, key, checksums, (*above, here))
    found = opened.as_base(saved.checkpoint)
    if found.checksum != saved.checksum:
        raise UserError(
            f"{reader.folder} belongs to a LoRA run, and its base {saved.checkpoint} has changed (checksum "
            f"{found.checksum} instead of {saved.checksum}): restore the base with which the LoRA run was trained"
        )
    return Merged(opened.stored, reader, lora_of(reader.manifest))
