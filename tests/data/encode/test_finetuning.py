"""Fine-tuning's data: which tokens an example has and which are learnt, what is cut, how examples share rows."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import encode, examples_of, some_records, store_of, tokenizer

from opt_parallel.config.model import IGNORED
from opt_parallel.config.task import TaskConfig, Truncation
from opt_parallel.data.encode.chat import chat_template
from opt_parallel.data.encode.columns import Encoded
from opt_parallel.data.encode.finetune import ExampleEncoder
from opt_parallel.data.encode.tokenizer import encode_documents, save_tokenizer
from opt_parallel.data.samples.packing import Examples, pack
from opt_parallel.data.text.records import Record
from opt_parallel.huggingface.tokenizer import read_tokenizer
from opt_parallel.runtime.errors import UserError

END = 2


def ids_of(text: str) -> list[int]:
    return encode_documents(tokenizer(), [text])[0]


def examples(encoded: Encoded) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each."""
    cuts = np.cumsum(encoded.columns["lengths"])[:-1]
    both = (np.split(encoded.columns[name], cuts) for name in ("ids", "targets"))
    return [(ids.tolist(), targets.tolist()) for ids, targets in zip(*both, strict=True)]


def marked(parts: list[tuple[list[int], int]]) -> tuple[list[int], list[int]]:
    return [token for ids, _ in parts for token in ids], [flag for ids, flag in parts for _ in ids]


def test_a_completion_and_its_end_are_learnt() -> None:
    pairs = [("the cat", " sat on the mat"), ("", "hello"), ("</s> is text", " and </s> too")]
    found = examples(encode([{"prompt": p, "completion": c, "id": 7} for p, c in pairs]))
    assert found == [marked([([END], 0), (ids_of(p), 0), ([*ids_of(c), END], 1)]) for p, c in pairs]
    assert found[2][0].count(END) == 2  # what spells a special token is text


def test_no_token_spans_prompt_and_completion() -> None:
    whole, parts = ids_of("hello"), [ids_of("hel"), ids_of("lo")]
    assert whole != parts[0] + parts[1], "the boundary must matter"
    assert examples(encode([{"prompt": "hel", "completion": "lo"}]))[0][0] == [END, *parts[0], *parts[1], END]


def test_fields_by_other_names_and_absent_values() -> None:
    named = encode([{"q": "the cat", "a": " sat", "messages": None}], prompt_field="q", completion_field="a")
    assert examples(named) == examples(encode([{"prompt": "the cat", "completion": " sat"}]))


CHATS: list[list[tuple[str, str]]] = [
    [("user", "hello there"), ("assistant", "goodbye")],
    [("system", "a dog"), ("user", "the cat"), ("assistant", "sat"), ("user", "the\n\n mat "), ("assistant", " \n3 ")],
    [("assistant", "hello"), ("assistant", "déjà vu 🙂"), ("user", "  \n\n"), ("user", ""), ("assistant", "goodbye")],
]


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content, "name": "not read"} for role, content in chat]


def test_answers_are_learnt() -> None:
    first, second, _ = examples(encode([{"messages": messages(chat)} for chat in CHATS]))
    asked = ids_of("User: hello there\nAssistant:")
    assert first == marked([([END], 0), (asked, 0), ([*ids_of(" goodbye"), END], 1)])
    assert first == examples(encode([{"prompt": "User: hello there\nAssistant:", "completion": " goodbye"}]))[0]
    assert second == marked([
        ([END], 0), (ids_of("System: a dog\nUser: the cat\nAssistant:"), 0), ([*ids_of(" sat"), END], 1),
        (ids_of("User: the\n\n mat \nAssistant:"), 0), ([*ids_of("  \n3 "), END], 1),
    ])  # fmt: skip


def test_transformers_writes_the_same_chats(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer(), tmp_path, chat_template(tokenizer(), END))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for chat in CHATS:
        ((ours, _),) = examples(encode([{"messages": messages(chat)}]))
        assert theirs.apply_chat_template(messages(chat), return_dict=False) == ours
        opening = theirs.apply_chat_template(messages(chat)[:-1], add_generation_prompt=True, return_dict=False)
        assert ours[: len(opening)] == opening
        assert ours[len(opening) :] == [*ids_of(f" {chat[-1][1]}"), END]
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_chat_template_is_brought_in_either_file(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(), tmp_path)
    assert read_tokenizer(str(tmp_path)).chat_template is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{"chat_template": "x",', 1))
    assert read_tokenizer(str(tmp_path)).chat_template == "x"
    (tmp_path / "chat_template.jinja").write_text("y")
    assert read_tokenizer(str(tmp_path)).chat_template == "y"


def test_what_nobody_answers_is_left_out_and_counted() -> None:
    chat = messages([*CHATS[0], ("user", "and"), ("system", "then")])
    encoded = encode([{"messages": chat}, {"messages": messages(CHATS[0])}])
    assert examples(encoded)[0] == examples(encoded)[1]
    assert encoded.counts == {"messages after a chat's last answer left out": 2}


def cut(length: int, truncation: str, record: dict[str, Any]) -> tuple[list[int], list[int], dict[str, int]]:
    encoded = encode([record], length, truncation=Truncation(truncation))
    ((ids, targets),) = examples(encoded)
    return ids, targets, dict(encoded.counts)


def test_what_is_too_long_is_cut_and_counted() -> None:
    prompt, completion = ids_of("one two three"), ids_of(" 4567")
    record, all_of_it = {"prompt": "one two three", "completion": " 4567"}, len(prompt) + len(completion) + 1
    prompts, completions = "examples with their prompt cut", "examples with their completion cut"
    for rule in ("keep_end", "keep_start"):  # a row of `length` holds length + 1 tokens, the last a target alone
        assert cut(all_of_it, rule, record)[2] == {}
        ids, targets, counts = cut(all_of_it - 3, rule, record)
        kept = prompt[3:] if rule == "keep_end" else prompt[:-3]
        assert (ids, targets) == marked([([END], 0), (kept, 0), ([*completion, END], 1)])
        assert counts == {prompts: 1}
        assert cut(len(completion) + 1, rule, record) == (
            *marked([([END], 0), ([*completion, END], 1)]), {prompts: 1},
        )  # fmt: skip
        # a cut completion does not end where it was cut
        assert cut(len(completion), rule, record) == (
            *marked([([END], 0), (completion, 1)]), {prompts: 1, completions: 1},
        )  # fmt: skip
        assert cut(1, rule, record)[:2] == ([END, completion[0]], [0, 1])


def test_of_a_chat_the_last_answer_stays() -> None:
    chat = {"messages": messages([("user", "the cat"), ("assistant", "sat"), ("user", "a dog"), ("assistant", "3")])}
    ((whole, flags),) = examples(encode([chat]))
    for less in (1, len(whole) // 3, len(whole) // 2):
        ids, targets, counts = cut(len(whole) - 1 - less, "keep_end", chat)
        assert ids == [END, *whole[1 + less :]]
        assert targets == [0, *flags[1 + less :]]
        assert counts == {"examples with their prompt cut": 1}


GOOD = {"prompt": "a", "completion": " b"}
SAYS = {"role": "user", "content": "a"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({**GOOD, "messages": [SAYS]}, "has both 'prompt' and 'messages': .* remove the other"),
    "half and messages": ({"prompt": "a", "messages": [SAYS]}, "has both 'prompt' and 'messages'"),
    "neither": ({"text": "a"}, r"has neither 'prompt' with 'completion' nor 'messages', only \['text'\]: set task"),
    "no completion": ({"prompt": "a"}, "has no 'completion' beside its 'prompt'"),
    "no prompt": ({"completion": "a", "prompt": None}, "has no 'prompt' beside its 'completion'"),
    "a number": ({"prompt": "a", "completion": 3}, "'completion' is 3, not a string"),
    "empty": ({"prompt": "a", "completion": " \n"}, "'completion' is empty, so there is nothing to learn"),
    "half a character": ({"prompt": "\ud83d", "completion": "a"}, r"'prompt': '\\ud83d' is half of a surrogate pair"),
    "no list": ({"messages": "hello"}, "'messages' is 'hello': it must be a list of messages"),
    "no messages": ({"messages": []}, r"'messages' is \[\]: it must be a list"),
    "no object": ({"messages": [SAYS, "hello"]}, "'messages': message 2 is 'hello': it must be an object"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 is {'role': 'user'}: it must be an object such as"),
    "role": ({"messages": [{**SAYS, "role": "tool"}]}, "message 1 has the role 'tool': the roles are system, user"),
    "no answer": ({"messages": [SAYS]}, "'messages' has no message of the assistant, so there is nothing to learn"),
    "content": (
        {"messages": [{"role": "assistant", "content": None}]}, "'messages': message 1 is None, not a string",
    ),
    "empty answer": ({"messages": [SAYS, {"role": "assistant", "content": " "}]}, "message 2 is empty"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_their_place(mistake: str) -> None:
    record, words = MISTAKES[mistake]
    with pytest.raises(UserError, match=f"^line 2.*{words}") as raised:
        encode([GOOD, record])
    assert "\n" not in str(raised.value)


def test_the_encoder_travels_and_its_identity_tells() -> None:
    encoder = ExampleEncoder(tokenizer(), END, TaskConfig(), 8)
    copy = pickle.loads(pickle.dumps(encoder))
    assert examples(copy.encode([Record("", GOOD)])) == examples(encoder.encode([Record("", GOOD)]))
    others = [
        ExampleEncoder(tokenizer(), END, TaskConfig(), 9),
        ExampleEncoder(tokenizer(301), END, TaskConfig(), 8),
        ExampleEncoder(tokenizer(), 3, TaskConfig(), 8),
        ExampleEncoder(tokenizer(), END, TaskConfig(prompt_field="q"), 8),
        ExampleEncoder(tokenizer(), END, TaskConfig(truncation=Truncation.keep_start), 8),
    ]
    assert copy.identity() == encoder.identity()
    assert encoder.identity() == ExampleEncoder(tokenizer(), END, TaskConfig(packing=False), 8).identity()
    assert all(other.identity() != encoder.identity() for other in others)


def test_every_example_has_a_place_and_no_row_overflows() -> None:
    sizes = np.minimum(512, np.random.default_rng(0).gamma(1.5, 80, 20_000).astype(int) + 1)
    rows = pack(sizes, 512)
    assert np.array_equal(np.unique(rows), np.arange(rows.max() + 1))
    assert np.bincount(rows, weights=sizes).max() <= 512
    assert sizes.sum() / ((rows.max() + 1) * 512) > 0.99
    # the least room that suffices: 3 goes beside 7, not beside 5; and a full row is closed
    assert pack(np.array([5, 7, 3, 5, 10, 1]), 10).tolist() == [0, 1, 1, 0, 2, 3]


def test_rows_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_parallel.data.samples.packing.OPEN_ROWS", 2)
    assert pack(np.array([6, 7, 8, 2, 3, 4]), 10).tolist() == [0, 1, 2, 1, 0, 3]  # row 2, the fullest, was closed


def test_rows_hold_examples_whole(tmp_path: Path) -> None:
    records, length = some_records(), 40
    expected = {}
    for ids, targets in examples(encode(records, length)):
        labels = [token if learnt else IGNORED for token, learnt in zip(ids[1:], targets[1:], strict=True)]
        expected[tuple(ids[:-1])] = labels
    assert len(expected) == len(records)
    store = store_of(tmp_path, records, length)
    for packing in (True, False):
        rows = Examples(store, length, packing)
        found = {}
        for number in range(len(rows)):
            sample = rows.sample(number)
            assert sample.segments is not None
            assert sample.positions is not None
            assert len(sample.ids) <= length
            for segment in range(1, int(sample.segments.max()) + 1):
                here = sample.segments == segment
                assert sample.positions[here].tolist() == list(range(here.sum()))
                found[tuple(sample.ids[here].tolist())] = sample.labels[here].tolist()
            assert np.all(np.diff(sample.segments) >= 0)
        assert found == expected
        assert (len(rows) < len(records)) == packing
        again = Examples(store, length, packing)
        assert [again.sample(n).ids.tolist() for n in range(len(again))] == [
            rows.sample(n).ids.tolist() for n in range(len(rows))
        ]


def test_what_is_said_at_the_start(tmp_path: Path) -> None:
    records = [{"prompt": "", "completion": "3"}] * 4  # </s> 3 </s>: two inputs
    assert examples_of(tmp_path / "a", records, 5, packing=True).summary() == (
        "4 examples of 2.0 tokens on average in 2 rows of 5, 80.0% full"
    )
    assert examples_of(tmp_path / "b", records, 5, packing=False).summary() == (
        "4 examples of 2.0 tokens on average, one per row"
    )
