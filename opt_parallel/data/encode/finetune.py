"""Encodes fine-tuning examples (prompts with completions, or chats), and marks the tokens that are targets.

    </s> prompt completion </s>         The targets are the completion and the </s> after it.
    </s> … answer </s> … answer </s>    The targets of a chat are each answer and the </s> after it, see `chat`.

The prompt and the completion are encoded separately, because generation encodes the prompt alone. So no token crosses
the boundary between the two texts.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.config.data import SpecialTokens
from opt_parallel.config.task import TaskConfig, Truncation
from opt_parallel.data.encode.chat import read_messages, turns_of
from opt_parallel.data.encode.columns import LENGTHS, Column, Encoded, columns_of, ids_column
from opt_parallel.data.encode.pretrain import special_tokens_key
from opt_parallel.data.encode.tokenizer import encode_documents
from opt_parallel.data.text.records import BadRecord, Record, require_characters, require_good
from opt_parallel.huggingface.tokenizer import count_tokens

PROMPT_CUT, COMPLETION_CUT = "examples with their prompt cut", "examples with their completion cut"
UNANSWERED = "messages after a chat's last answer left out"

Turn = tuple[list[int], list[int]]  # the token ids of a prompt and of its answer


class ExampleEncoder:
    """Encodes each record into at most `length` + 1 tokens, of which the last token is only a target.

    `task` names the fields of a record that hold the prompt, the completion and the chat."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: int,
        task: TaskConfig,
        length: int,
        spelled: SpecialTokens = SpecialTokens.text,
    ) -> None:
        self.tokenizer, self.end, self.task, self.length, self.spelled = tokenizer, end, task, length, spelled
        self.columns = {
            "ids": ids_column(count_tokens(tokenizer)),
            "targets": Column("uint8", per_token=True),  # 1 if the token is a target, else 0
            "lengths": LENGTHS,
        }

    def identity(self) -> list[Any]:
        task = self.task
        fields = [task.prompt_field, task.completion_field, task.messages_field, task.truncation.value]
        return ["finetune", self.tokenizer.to_str(), self.end, *fields, self.length, *special_tokens_key(self.spelled)]

    def check(self, record: Record) -> None:
        self._turns(record, Counter())

    def encode(self, records: list[Record]) -> Encoded:
        counts: Counter[str] = Counter()
        examples = [self._turns(record, counts) for record in records]
        texts = [text for turns in examples for turn in turns for text in turn]
        ids = iter(encode_documents(self.tokenizer, texts, self.spelled))
        made = [self._example([(next(ids), next(ids)) for _ in turns], counts) for turns in examples]
        targets = np.fromiter((flag for _, flags in made for flag in flags), np.uint8)
        return Encoded({**columns_of([tokens for tokens, _ in made]), "targets": targets}, counts)

    def _turns(self, record: Record, counts: Counter[str]) -> list[tuple[str, str]]:
        """The pairs (prompt, answer) of a record. Only a chat has several pairs. Raises: BadRecord."""
        task, where = self.task, record.where
        pair, chat = [task.prompt_field, task.completion_field], task.messages_field
        given = [name for name in (*pair, chat) if record.fields.get(name) is not None]
        if not given:
            raise BadRecord(
                f"{where} has neither {pair[0]!r} with {pair[1]!r} nor {chat!r}, only {record.names}: set "
                "task.prompt_field and task.completion_field, or task.messages_field"
            )
        if given == [chat]:
            return self._chat(record.fields[chat], f"{where}: {chat!r}", counts)
        require_good(
            chat not in given,
            f"{where} has both {given[0]!r} and {chat!r}: an example has only one of these fields, remove the other",
        )
        for name in pair:
            require_good(name in given, f"{where} has no {name!r} beside its {given[0]!r}: an example needs both")
        prompt, completion = (_text(record.fields[name], f"{where}: {name!r}") for name in pair)
        return [(prompt, _not_empty(completion, f"{where}: {pair[1]!r}"))]

    def _chat(self, value: Any, where: str, counts: Counter[str]) -> list[tuple[str, str]]:
        messages = []
        for number, (role, content) in enumerate(read_messages(value, where), start=1):
            text = _text(content, f"{where}: message {number}")
            messages.append((role, _not_empty(text, f"{where}: message {number}") if role == "assistant" else text))
        turns, unanswered = turns_of(messages)
        if unanswered:
            counts[UNANSWERED] += unanswered
        return turns

    def _example(self, turns: list[Turn], counts: Counter[str]) -> tuple[list[int], list[int]]:
        """The tokens of an example and their target marks (0 or 1), cut to the maximum length.

        In a chat, the last answer counts as the completion, and all text before it counts as the prompt."""
        before, learnt = [*turns[0][0]], [0] * len(turns[0][0])
        for (_, answer), (prompt, _) in pairwise(turns):
            before += [*answer, self.end, *prompt]
            learnt += [1] * (len(answer) + 1) + [0] * len(prompt)
        completion = [*turns[-1][1], self.end]
        room = max(0, self.length - len(completion))
        if len(before) > room:
            counts[PROMPT_CUT] += 1
            keep_end = self.task.truncation is Truncation.keep_end
            kept = slice(len(before) - room, None) if keep_end else slice(room)
            before, learnt = before[kept], learnt[kept]
        if len(completion) > self.length:
            counts[COMPLETION_CUT] += 1
            completion = completion[: self.length]  # without </s>, because the completion does not end at the cut
        return [self.end, *before, *completion], [0, *learnt, *[1] * len(completion)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where} is {value!r:.40}, not a string: write it as text")
    require_characters(value, where)
    return value


def _not_empty(text: str, where: str) -> str:
    require_good(
        bool(text.strip()), f"{where} is empty, so there is nothing to learn: fill it in, or leave the record out"
    )
    return text
