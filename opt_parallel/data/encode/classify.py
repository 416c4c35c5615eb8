"""Encodes the examples of a classifier. An example is a text or a pair of texts, with a label.

A text is encoded as `</s>` text, and a pair of texts as `</s>` first `</s>` second, as in OPT's tokenizer. A label is a
name, a list of names, or numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.config.data import SpecialTokens
from opt_parallel.config.model import Labels, ProblemType, require
from opt_parallel.config.task import TaskConfig, Truncation, name_of
from opt_parallel.data.encode.columns import LENGTHS, Column, Encoded, columns_of, ids_column
from opt_parallel.data.encode.pretrain import EMPTY, special_tokens_key
from opt_parallel.data.encode.tokenizer import encode_documents
from opt_parallel.data.text.records import BadRecord, Record, require_characters
from opt_parallel.huggingface.tokenizer import count_tokens
from opt_parallel.runtime.errors import UserError

MOST_LABELS = 10_000  # Maximum number of different labels; more labels are probably texts, and could exceed the memory.
MOST_DIGITS = 100  # Maximum length of labels that are sorted as numbers; Python does not parse thousands of digits.
SINGLE, MULTI = ProblemType.single_label_classification, ProblemType.multi_label_classification


class LabelledEncoder:
    """Encodes each example of a classifier into at most `length` token ids and a label."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: int,
        text_field: str,
        task: TaskConfig,
        labels: Labels,
        length: int,
        spelled: SpecialTokens = SpecialTokens.text,
    ) -> None:
        """`end` is the token id of `</s>`."""
        self.tokenizer, self.end, self.length, self.spelled = tokenizer, end, length, spelled
        self.text_field, self.task, self.labels = text_field, task, labels
        self.numbers = {name: number for number, name in enumerate(labels.names)}
        least = 2 if task.pair_field is None else 4
        require(length >= least, f"data.sequence_length={length} has no room for a text: it must be at least {least}")
        one = labels.problem_type is SINGLE
        label = Column("int32") if one else Column("float32", width=len(labels.names))
        self.columns = {"ids": ids_column(count_tokens(tokenizer)), "lengths": LENGTHS, "label": label}

    def identity(self) -> list[Any]:
        task, labels = self.task, self.labels
        fields = [self.text_field, task.pair_field, task.label_field, task.truncation.value]
        kind = labels.problem_type and labels.problem_type.value
        own = [self.tokenizer.to_str(), self.end, self.length, fields, list(labels.names), kind]
        return ["labelled", *own, *special_tokens_key(self.spelled)]

    def check(self, record: Record) -> tuple[list[str], int | list[float]]:
        """The texts and the label of a record. Raises: BadRecord."""
        fields = [name for name in (self.text_field, self.task.pair_field) if name is not None]
        return [_text(record, name) for name in fields], self._label(record)

    def encode(self, records: list[Record]) -> Encoded:
        examples = [self.check(record) for record in records]
        kept = [(texts, label) for texts, label in examples if any(text.strip() for text in texts)]
        ids = iter(encode_documents(self.tokenizer, [text for texts, _ in kept for text in texts], self.spelled))
        counts: Counter[str] = Counter({EMPTY: len(records) - len(kept)} if len(kept) < len(records) else {})
        documents = []
        for texts, _ in kept:
            parts = [next(ids) for _ in texts]
            if sum(map(len, parts)) + len(parts) > self.length:
                parts = self._cut(parts)
                counts[f"cut to data.sequence_length={self.length}"] += 1
            documents.append([token for part in parts for token in (self.end, *part)])
        labels = np.array([label for _, label in kept], np.dtype(self.columns["label"].dtype))
        return Encoded({**columns_of(documents), "label": labels}, counts)

    def _cut(self, parts: list[list[int]]) -> list[list[int]]:
        """Cut one or two texts to the length. Of two texts, the longer is cut first, until both are equally long."""
        room = self.length - len(parts)
        lengths = [room]
        if len(parts) == 2:
            first, second = map(len, parts)
            half = room // 2
            shorter = min(first, second, half)
            lengths = [shorter, room - shorter] if first <= second else [room - shorter, shorter]
        if self.task.truncation is Truncation.keep_start:
            return [part[:size] for part, size in zip(parts, lengths, strict=True)]
        return [part[len(part) - min(size, len(part)) :] for part, size in zip(parts, lengths, strict=True)]

    def _label(self, record: Record) -> int | list[float]:
        value, problem_type = label_of(record, self.task.label_field), self.labels.problem_type
        if problem_type is ProblemType.regression:
            return self._measures(value, record.where)
        if problem_type is SINGLE:
            return self._number(value, record.where)
        if not isinstance(value, list):
            raise BadRecord(f"{record.where}: the label {value!r} is not a list of names, which {MULTI.value} needs")
        chosen = {self._number(each, record.where) for each in value}
        return [float(number in chosen) for number in range(len(self.labels.names))]

    def _number(self, value: Any, where: str) -> int:
        if isinstance(value, (list, dict)):
            raise BadRecord(f"{where}: the label {value!r:.60} is not one name: correct it, or set task.problem_type")
        name = name_of(value)
        if name not in self.numbers:
            known = ", ".join(self.labels.names[:10]) + (", …" if len(self.labels.names) > 10 else "")
            raise BadRecord(
                f"{where}: the label {name!r:.60} is not one of {known}: correct it, or list all labels in task.labels"
            )
        return self.numbers[name]

    def _measures(self, value: Any, where: str) -> list[float]:
        values, number = value if isinstance(value, list) else [value], len(self.labels.names)
        try:
            measures = [float(each) for each in values if not isinstance(each, bool)]
        except (TypeError, ValueError, OverflowError):  # an integer of hundreds of digits is too large for a float
            measures = []
        if len(measures) != number or len(values) != number or not all(map(math.isfinite, measures)):
            expected = "a number" if number == 1 else f"{number} numbers"
            raise BadRecord(f"{where}: the label {value!r:.60} is not {expected}, which regression needs: correct it")
        return measures


def find_labels(task: TaskConfig, records: Iterable[Record], declared: Sequence[str] = ()) -> Labels:
    """Infer the labels from `records`, unless the task's configuration gives them.

    The labels are a problem type, and the names of the labels or the number of regression targets. Declared names come
    first, in their order. The other names follow in sorted order.

    Raises: UserError if labels are of different kinds, or if there is only one label or too many. BadRecord."""
    kinds: dict[tuple[bool, str], str] = {}  # (whether a label is a list, its kind) → location of the first such label
    names: set[str] = set()
    width = 1
    for record in records:
        value, several = check_label(record, task.label_field)
        values = value if several else [value]
        if not kinds:
            width = len(values)
        for kind in {_kind(each, record.where) for each in values} or {"no name"}:
            kinds.setdefault((several, kind), record.where)
        if len(names) <= MOST_LABELS:
            names.update(map(name_of, values))
    problem_type = task.problem_type or _problem_type(kinds)
    if problem_type is ProblemType.regression:
        return Labels(tuple(task.labels or Labels.numbered(width).names), problem_type)
    if task.labels is not None:
        return Labels(tuple(task.labels), problem_type)
    fix = f"set task.label_field={task.label_field} to a field with fewer labels, or list all labels in task.labels"
    require(len(names) <= MOST_LABELS, f"there are more than {MOST_LABELS:,} different labels: {fix}")
    every = [*declared, *_sorted(names - set(declared))] if names else []
    require(
        len(every) >= (2 if problem_type is SINGLE else 1),
        f"all labels are {every[0]!r:.60}, so there is nothing to learn: list all labels in task.labels"
        if every
        else "no example has a label: list the labels in task.labels",
    )
    return Labels(tuple(every), problem_type)


def check_label(record: Record, label_field: str) -> tuple[Any, bool]:
    """The label of a record, and whether the label is a list. Raises: BadRecord if the label is invalid."""
    value = label_of(record, label_field)
    several = isinstance(value, list)
    for each in value if several else [value]:
        _kind(each, record.where)
    return value, several


def label_of(record: Record, label_field: str) -> Any:
    """The value of a record's label field. Raises: BadRecord if the record has no such field."""
    if record.fields.get(label_field) in (None, ""):
        has = "an empty" if label_field in record.fields else "no"
        raise BadRecord(f"{record.where} has {has} field {label_field!r} among {record.names}: set task.label_field")
    return record.fields[label_field]


def _kind(value: Any, where: str) -> str:
    if isinstance(value, str):
        require_characters(value, f"{where}: the label")
        if value == "???":
            raise BadRecord(f"{where}: the label {value!r} means a missing value in a configuration: rename it")
    for kind, types in (("a name", (str, bool)), ("a whole number", int), ("a number", float)):
        if isinstance(value, types):
            return kind
    raise BadRecord(
        f"{where}: the label {value!r:.60} is neither a name nor a number: correct it, or set task.label_field"
    )


def _problem_type(kinds: dict[tuple[bool, str], str]) -> ProblemType:
    """The problem type for labels of these kinds, which is regression if a label is a fraction, else classification."""
    named = [key for key in kinds if key[1] == "a name"]
    numbers = [key for key in kinds if key[1] in ("a whole number", "a number")]
    several, single = [key for key in kinds if key[0]], [key for key in kinds if not key[0]]
    for left, right in ((named, numbers), (several, single)):
        if left and right:
            here, there = ("a list" if key[0] else key[1] for key in (left[0], right[0]))
            raise UserError(
                f"{kinds[left[0]]}: the label is {here}, but {kinds[right[0]].rpartition(': ')[2]} has {there}: "
                "use one kind of label, or set task.problem_type"
            )
    if any(kind == "a number" for _, kind in kinds):
        return ProblemType.regression
    return MULTI if several else SINGLE


def _sorted(names: set[str]) -> list[str]:
    """The names of labels in numerical order if they are numbers, else in alphabetical order."""
    numbers = all(name.isdecimal() and len(name) <= MOST_DIGITS for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def _text(record: Record, name: str) -> str:
    text = record.fields.get(name)
    if not isinstance(text, str):
        has = f"{text!r:.40} as {name!r}, not a text" if name in record.fields else f"no field {name!r}"
        raise BadRecord(f"{record.where} has {has}: set data.text_field and task.pair_field to fields with texts")
    require_characters(text, record.where)
    return text
