"""`generate` by the names that people type: transformers' tokens, greedily and with beams, and its distribution."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opt_parallel import GenerationConfig, OPTForCausalLM
from opt_parallel.model.decoding import Decoding, next_tokens, ruled
from opt_parallel.model.rules import narrowed, penalized, without_ends, without_repeats

# 23 tokens, so that texts end and repeat themselves; weights so large that no two choices are nearly as good
SHAPE: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 40, "init_std": 0.3,
}  # fmt: skip


def write_model(folder: Path, seed: int) -> Any:
    from transformers import OPTConfig
    from transformers import OPTForCausalLM as Theirs

    torch.manual_seed(seed)
    model = Theirs(OPTConfig(**SHAPE)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[OPTForCausalLM, Any]:
    folder = tmp_path_factory.mktemp("generate")
    theirs = write_model(folder, 1)
    return OPTForCausalLM.from_pretrained(folder), theirs


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 9, 4 and 8 tokens, padded on the left; tokens repeat within them."""
    ids = torch.randint(3, 12, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 5), (2, 1)):
        ids[row, :padding], mask[row, :padding] = 1, 0
    return ids, mask


ONE_BY_ONE: list[dict[str, Any]] = [
    {},
    {"max_length": 12},
    {"max_new_tokens": 3},
    {"max_new_tokens": 31},
    {"max_new_tokens": 18, "min_new_tokens": 18},
    {"max_length": 30, "min_length": 27},
    {"max_new_tokens": 18, "min_new_tokens": 9, "min_length": 30},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1, "max_new_tokens": 6},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"eos_token_id": 7},
    {"eos_token_id": [7, 9, 2]},
    {"eos_token_id": [7, 9, 2], "min_new_tokens": 4},
    {"pad_token_id": 5},
    {"pad_token_id": 0, "eos_token_id": [7, 9, 2]},
    {"bos_token_id": 3, "top_k": None},
]
# Each search is tested with a share of the settings, another one than its neighbours.
SHARES = [0, *(pytest.param(share, marks=pytest.mark.long) for share in range(1, 3))]
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0, "early_stopping": True},
]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("search", [{}, *SEARCHES], ids=str)
def test_greedy_and_beams_are_transformers(
    models: tuple[OPTForCausalLM, Any], search: dict[str, Any], share: int
) -> None:
    ours, theirs = models
    ids, mask = prompts()
    ended = []
    for settings in ONE_BY_ONE[(share + [{}, *SEARCHES].index(search)) % len(SHARES) :: len(SHARES)]:
        expected = theirs.generate(ids, attention_mask=mask, **settings, **search)
        actual = ours.generate(ids, attention_mask=mask, **settings, **search)
        assert actual.tolist() == expected.tolist(), settings
        ended.append(actual.size(1))
    assert len(set(ended)) > 2  # or the settings would show nothing


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_settings_together(models: tuple[OPTForCausalLM, Any], every: int) -> None:
    ours, theirs = models
    ids, mask = prompts()
    choices = ((1.0, 1.2), (0, 2), (0, 6), (2, [7, 9]), ({}, SEARCHES[1], SEARCHES[4]))
    for penalty, size, least, ends, search in list(itertools.product(*choices))[::every]:
        settings = {
            "repetition_penalty": penalty, "no_repeat_ngram_size": size, "min_new_tokens": least, "eos_token_id": ends,
            "max_new_tokens": 14, **search,
        }  # fmt: skip
        expected = theirs.generate(ids, attention_mask=mask, **settings)
        assert ours.generate(ids, attention_mask=mask, **settings).tolist() == expected.tolist(), settings


def test_the_forms_of_a_call(models: tuple[OPTForCausalLM, Any]) -> None:
    from transformers import BatchEncoding
    from transformers import GenerationConfig as Theirs

    ours, theirs = models
    ids, mask = prompts()
    expected = theirs.generate(ids, attention_mask=mask, max_length=20).tolist()
    assert ours.generate(ids, max_length=20).tolist() == expected  # the padding tokens tell the mask
    assert ours.generate(inputs=ids, max_length=20).tolist() == expected
    assert (
        ours.generate(**BatchEncoding({"input_ids": ids, "attention_mask": mask}), max_length=20).tolist() == expected
    )
    for config in (Theirs(max_length=20), GenerationConfig(max_length=20), {"max_length": 20}):
        assert ours.generate(ids, config).tolist() == expected
        assert ours.generate(ids, generation_config=config, max_new_tokens=2).size(1) == ids.size(1) + 2
    assert ours.generate(max_new_tokens=4).tolist() == theirs.generate(max_new_tokens=4).tolist()


def test_generation_config_of_the_folder(tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "theirs", 1)
    theirs.generation_config.max_length, theirs.generation_config.repetition_penalty = 15, 1.4
    theirs.generation_config.save_pretrained(tmp_path / "theirs")
    ours = OPTForCausalLM.from_pretrained(tmp_path / "theirs")
    ids, mask = prompts()
    assert ours.generate(ids, attention_mask=mask).tolist() == theirs.generate(ids, attention_mask=mask).tolist()
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert again.generate(ids, attention_mask=mask).tolist() == theirs.generate(ids, attention_mask=mask).tolist()
    ours.generation_config.max_length = 11
    assert ours.generate(ids, attention_mask=mask).size(1) == 11
    (tmp_path / "theirs" / "generation_config.json").write_text(
        '{"num_beams": 2, "num_beam_groups": 2, "typical_p": 1.0}'
    )
    with pytest.raises(ValueError, match="num_beam_groups=2 of the generation config is not supported"):
        OPTForCausalLM.from_pretrained(tmp_path / "theirs").generate(ids)


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, tokens: Tensor) -> None:
        self.told.append(tokens.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_a_streamer_hears_what_transformers_tells(models: tuple[OPTForCausalLM, Any]) -> None:
    ids, _ = prompts()
    heard = []
    for model in models:
        streamer = Heard()
        model.generate(ids[:1], streamer=streamer, max_new_tokens=5)
        heard.append(streamer.told)
    assert heard[0] == heard[1]
    assert heard[0][-1] == "end"


def test_sampled_texts(models: tuple[OPTForCausalLM, Any]) -> None:
    """Several of each prompt, which differ, and the same texts when they are sampled again."""
    ours, _ = models
    ids, mask = prompts()
    settings = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 4, "max_new_tokens": 9}
    torch.manual_seed(5)
    first, second = ours.generate(ids, **settings), ours.generate(ids, **settings)
    assert first.size(0) == 12
    assert torch.equal(first[:, : ids.size(1)], ids.repeat_interleave(4, dim=0))
    assert len({tuple(row) for row in first.tolist()}) == 12
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, ours.generate(ids, **settings))
    assert torch.equal(ours.generate(ids, seed=3, **settings), ours.generate(ids, seed=3, **settings))


def test_a_drawn_token_has_transformers_probabilities() -> None:
    """Exactly: the scores that a draw inverts are those that transformers' processors give, in their order."""
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )  # fmt: skip

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 23, generator=generator) * 3
    texts = torch.randint(0, 6, (6, 15), generator=generator)
    for penalty, size, least, temperature, top_k, top_p in itertools.product(
        (1.0, 1.5), (0, 2), (0, 5), (0.7, 1.0), (None, 5), (1.0, 0.8)
    ):
        theirs = LogitsProcessorList()
        theirs += [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
        theirs += [NoRepeatNGramLogitsProcessor(size)] if size else []
        theirs += [MinNewTokensLengthLogitsProcessor(12, least, torch.tensor([2, 7]))] if least else []
        theirs += [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        theirs += [TopKLogitsWarper(top_k)] if top_k else []
        theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        decoding = Decoding(
            20, temperature, top_k, top_p, min_new_tokens=least, repetition_penalty=penalty, no_repeat_ngram=size,
            ends=(2, 7),
        )  # fmt: skip
        scores = ruled(logits, decoding, [texts[:, :12], texts[:, 12:]], index=3, padding=None)
        kept = narrowed(scores, temperature, top_k, top_p).softmax(-1)
        # float32, with a maximum subtracted first
        torch.testing.assert_close(kept, theirs(texts, logits.clone()).softmax(-1), rtol=1e-4, atol=1e-6)
        drawn = next_tokens(scores, decoding, range(6), 3)
        assert (kept[torch.arange(6), drawn] > 0).all()


def test_rules_by_hand() -> None:
    scores, texts = torch.tensor([[1.0, -1.0, 2.0, -2.0]]), torch.tensor([[0, 1, 2, 0, 1]])
    assert penalized(scores, texts, 2.0, None).tolist() == [[0.5, -2.0, 1.0, -2.0]]
    assert penalized(scores, texts, 2.0, torch.tensor([5])).tolist() == scores.tolist()
    assert without_repeats(scores, texts, 3).isinf().tolist() == [[False, False, True, False]]
    assert without_repeats(scores, texts, 1).isinf().tolist() == [[True, True, True, False]]
    assert torch.equal(without_repeats(scores, texts, 7), scores)
    assert without_ends(scores, (3, 0)).isinf().tolist() == [[True, False, False, True]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_new_token": 5}, "max_new_token is not an argument: check its spelling; supported are bos_token_id"),
    ({"stopping_criteria": [print]}, "stopping_criteria is not an argument"),
    ({"logits_processor": [print]}, "logits_processor is not an argument"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate is not an argument"),
    ({"max_length": 9}, "max_length=9 is not more than the prompt's 9 tokens"),
    ({"max_length": 20, "max_new_tokens": 5}, "give one of them"),
    ({"max_new_tokens": 5.0}, "max_new_tokens=5.0 must be a whole number"),
    ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens=6 is more than max_new_tokens=5"),
    ({"max_new_tokens": 32}, "9 tokens and max_new_tokens=32 make 41"),
    ({"num_return_sequences": 2}, "num_return_sequences=2: greedy decoding gives one text"),
    ({"num_beams": 2, "do_sample": True}, "num_beams=2 searches and do_sample=True samples"),
    ({"num_beams": 12}, "num_beams=12 is too many for the model's 23 tokens: set num_beams=11 or less"),
    ({"length_penalty": 2.0}, "length_penalty=2.0 compares beams, but num_beams=1: set num_beams to 2 or more"),
    ({"early_stopping": "maybe", "num_beams": 2}, "early_stopping='maybe' must be False, True or 'never'"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be larger than 0"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must not be negative"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
    ({"eos_token_id": 23}, "eos_token_id=23 is not in the vocabulary"),
    ({"pad_token_id": 99}, "pad_token_id=99 is not in the vocabulary"),
    ({"temperature": 0.7}, "temperature=0.7 affects sampling only: set do_sample=True"),
    ({"use_cache": False}, "use_cache=False is not supported"),
    ({"attention_mask": torch.tensor([[1] * 8 + [0]] * 3)}, "pad prompts on the left"),
    ({"streamer": Heard(), "num_beams": 2}, "a streamer needs each token"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_generate_says(models: tuple[OPTForCausalLM, Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^generate: ") as caught:
        models[0].generate(prompts()[0], **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
