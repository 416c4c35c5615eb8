"""docs/python.md: its examples run with our classes at tensor 1 and 2, and with transformers', with equal results."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
LANGUAGE, CLASSIFIER = "facebook/opt-350m", "ArthurZ/opt-350m-dummy-sc"
WORDS = ("Hello, my dog is cute", "Hey, are you consciours? Can you talk to me?", "I'm not consciours")
SHAPE: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.2,
}  # fmt: skip


def examples() -> list[str]:
    """The code of the page's interactive examples, one text a block."""
    blocks = re.findall(r"```python\n(>>> .*?)```", PAGE.read_text(), re.DOTALL)
    return ["".join(example.source for example in doctest.DocTestParser().get_examples(block)) for block in blocks]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small checkpoints in place of those of the hub, with a tokenizer of OPT's kind."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(WORDS * 9, vocab_size=SHAPE["vocab_size"], special_tokens=special)
    found = {}
    for name, kind in ((LANGUAGE, "OPTForCausalLM"), (CLASSIFIER, "OPTForSequenceClassification")):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        getattr(transformers, kind)(transformers.OPTConfig(**SHAPE)).save_pretrained(folder)
        tokenizer.save_model(str(folder))
        settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>",
                    "pad_token": "<pad>", "add_bos_token": True}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found[name] = str(folder)
    return found


def localised(code: str, folders: dict[str, str]) -> str:
    """The code with folders in place of the hub's names; a smaller model and vocabulary, which changes no call."""
    for name, folder in folders.items():
        code = code.replace(f'"{name}"', repr(folder))
    small = "OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)"
    return code.replace("OPTConfig()", small).replace("50300", "400")


def results(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the code leaves behind: tensors, numbers and texts by name."""
    exec(compile(code, str(PAGE), "exec"), names)
    kept = {name: each for name, each in names.items() if isinstance(each, Tensor | int | float | str)}
    return {name: each.detach().numpy() if isinstance(each, Tensor) else each for name, each in kept.items()
            if name != "__name__"}  # fmt: skip


def ours(code: str, tensor: int) -> dict[str, Any]:
    """On the crew: the results of the code, with `tensor=` added where a model is made."""
    from opt_parallel import Topology

    with Topology.open(tensor) as topology:
        made = re.sub(r"(OPT\w+(?:\.from_pretrained)?\(\s*(?:'[^']*'|configuration))", r"\1, tensor=group", code)
        assert ("tensor=group" in made) == ("OPT" in code)
        return results(made, {"group": topology.tensor, "__name__": "page"})


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("number", range(len(examples())))
def test_the_examples_of_the_page(crew: Any, folders: dict[str, str], number: int, tensor: int) -> None:
    code = localised(examples()[number], folders)
    answers = crew(tensor)(ours, code, tensor)
    expected = results(code.replace("from opt_parallel import", "from transformers import"), {"__name__": "page"})
    for answer in answers:
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, str | int):
                assert answer[name] == value, name
            else:  # float32 sums of about 100 numbers of order 1
                torch.testing.assert_close(answer[name], value, rtol=2e-5, atol=2e-5)


def test_the_page_has_every_example() -> None:
    """Those of the documented page, at least."""
    text = "\n".join(examples())
    assert len(examples()) == 7
    for call in (
        "OPTConfig()", "OPTModel(configuration)", "model.config", "outputs.last_hidden_state", "max_length=30",
        "id2label[predicted_class_id]", "num_labels=num_labels", 'problem_type="multi_label_classification"',
        "loss.backward()", "past_key_values=", "resize_token_embeddings(",
    ):  # fmt: skip
        assert call in text
