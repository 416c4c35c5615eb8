"""Generated texts: transformers' tokens, the same at any tensor degree, in a batch and alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.model.decoding import Decoding, next_tokens
from opt_parallel.model.generation import generate, left_padded
from opt_parallel.model.heads import CausalLM
from opt_parallel.model.rules import narrowed
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError

CPU = torch.device("cpu")
# 23 words, so that the end-of-text token comes up now and then; no multiple of 2, so that a rank's part is padded
SHAPE = {
    "vocab_size": 23, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "init_std": 0.3,
}  # fmt: skip
STYLES: list[dict[str, Any]] = [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 24}]
SAMPLED = Decoding(max_new_tokens=12, temperature=1.5, top_k=20, top_p=0.95, seed=7)
DECODINGS = [Decoding(12), Decoding(12, beams=3), SAMPLED]


def write_model(folder: Path, seed: int, **style: Any) -> Any:
    """A random model of transformers' in `folder`, its weights so large that no two choices are nearly as good."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**SHAPE, **style)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    return model


def prompts_of(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[2, *torch.randint(3, 23, (length,), generator=generator).tolist()] for length in (3, 7, 5)]


def continued(folder: Path, seed: int, tensor: int) -> list[list[list[int]]]:
    """On the crew: the rows of a left-padded batch with what follows them, by each of DECODINGS."""
    from opt_parallel.parallel.topology import Topology

    ids, mask = left_padded(prompts_of(seed), 1, CPU)
    with Topology.open(tensor) as topology:
        model = open_checkpoint(folder).model(topology.tensor, CPU)
        return [generate(model, ids, mask, decoding).tolist() for decoding in DECODINGS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The models of seeds 0 to 3."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        write_model(folder / str(seed), seed)
    return [folder / str(seed) for seed in range(4)]


@pytest.fixture
def model(folders: list[Path]) -> CausalLM:
    return open_checkpoint(folders[0]).model(ALONE, CPU)


@pytest.mark.parametrize(
    ("seed", "style"),
    [
        pytest.param(seed, style, marks=[pytest.mark.long] * ((seed, style) not in ((0, 0), (1, 1))))
        for seed in range(4)
        for style in (0, 1)
    ],
)
def test_greedy_and_beams_are_transformers(
    tmp_path: Path, seed: int, style: int, request: pytest.FixtureRequest
) -> None:
    theirs = write_model(tmp_path, seed, **STYLES[style])
    ours = open_checkpoint(tmp_path).model(ALONE, CPU)
    ids, mask = left_padded(prompts_of(seed), 1, CPU)
    searches = [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.0), (4, 2.0), (4, -1.0)]
    if not request.config.getoption("long"):  # each in one of two tests
        searches = searches[style::2]
    for new in (4, 20) if request.config.getoption("long") else (20,):
        for beams, penalty in searches:
            expected = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, num_beams=beams, length_penalty=penalty
            )
            actual = generate(ours, ids, mask, Decoding(new, beams=beams, length_penalty=penalty))
            assert actual.tolist() == expected.tolist(), (new, beams, penalty)


def test_some_of_these_texts_end_early_and_some_do_not(folders: list[Path]) -> None:
    """Or the test above would say nothing about ending."""
    for beams in (1, 4):
        ended: list[bool] = []
        for seed, folder in enumerate(folders):
            ids, mask = left_padded(prompts_of(seed), 1, CPU)
            output = generate(open_checkpoint(folder).model(ALONE, CPU), ids, mask, Decoding(20, beams=beams))
            ended += (output[:, ids.size(1) :] == 2).any(dim=1).tolist()
            if len(set(ended)) == 2:
                break
        assert len(set(ended)) == 2


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_same_at_any_tensor_degree(crew: Any, folders: list[Path], size: int) -> None:
    (alone,) = crew(1)(continued, folders[1], 1, 1)
    assert crew(size)(continued, folders[1], 1, size) == [alone] * size


@pytest.mark.parametrize("decoding", DECODINGS, ids=["greedy", "beams", "sampled"])
def test_a_row_of_a_batch_is_the_row_alone(model: CausalLM, decoding: Decoding) -> None:
    prompts = prompts_of(2)
    ids, mask = left_padded(prompts, 1, CPU)
    batch = generate(model, ids, mask, decoding).tolist()
    for row, prompt in enumerate(prompts):
        (alone,) = generate(model, torch.tensor([prompt]), None, decoding, first_row=row).tolist()
        start = ids.size(1) - len(prompt)
        assert batch[row][start : start + len(alone)] == alone
        assert set(batch[row][start + len(alone) :]) <= {1}  # padding


def told_another_model(folders: list[Path]) -> list[list[list[int]]]:
    """On the crew: ranks with models of their own that go together, as no user's do."""
    from opt_parallel.parallel.topology import Topology

    ids, mask = left_padded(prompts_of(4), 1, CPU)
    with Topology.open(1) as topology:
        model = open_checkpoint(folders[topology.world.rank]).model(ALONE, CPU)
        return [generate(model, ids, mask, decoding, topology.world).tolist() for decoding in DECODINGS]


def test_the_first_rank_decides(crew: Any, folders: list[Path]) -> None:
    first, second = crew(2)(told_another_model, folders)
    assert first == second
    assert [first] == crew(1)(told_another_model, folders)


def test_seeds_and_rows_differ(model: CausalLM) -> None:
    ids = torch.tensor([prompts_of(3)[1]] * 2)
    first, second = generate(model, ids, None, SAMPLED).tolist()
    assert first != second
    other = generate(model, ids, None, dataclasses.replace(SAMPLED, seed=8)).tolist()
    assert first not in other
    assert generate(model, ids, None, SAMPLED).tolist() == [first, second]


def test_a_row_that_ended_is_filled_up_and_tokens_are_told_as_they_come(folders: list[Path]) -> None:
    told: list[list[int]] = []
    for seed, folder in enumerate(folders):
        ids, mask = left_padded(prompts_of(seed), 1, CPU)
        told.clear()
        model = open_checkpoint(folder).model(ALONE, CPU)
        output = generate(model, ids, mask, Decoding(20), on_tokens=told.append)
        new = output[:, ids.size(1) :]
        assert told == new.T.tolist()
        ends = [row.index(2) for row in new.tolist() if 2 in row]
        for row in new.tolist():
            if 2 in row:
                assert set(row[row.index(2) + 1 :]) <= {1}
        if ends and min(ends) < new.size(1) - 1:
            row = next(row for row, tokens in enumerate(new.tolist()) if 2 in tokens)
            alone = generate(model, torch.tensor([prompts_of(seed)[row]]), None, Decoding(20))
            assert alone[0, -1] == 2  # nothing is computed after the last row's end
            return
    raise AssertionError("no row ended before another")


def test_sampling_keeps_what_transformers_keeps() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 3
    for temperature in (0.3, 1.0, 2.0):
        for top_k in (None, 1, 7, 300):
            for top_p in (1.0, 0.9, 0.3, 1e-6):
                expected = TemperatureLogitsWarper(temperature)(None, logits)
                if top_k is not None:
                    expected = TopKLogitsWarper(top_k)(None, expected)
                if top_p < 1:
                    expected = TopPLogitsWarper(top_p)(None, expected)
                ours = narrowed(logits, temperature, top_k, top_p)
                assert torch.equal(ours.isfinite(), expected.isfinite()), (temperature, top_k, top_p)
                # shifting by the maximum rounds once, at the size of the logits
                torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-6)


def test_any_temperature_above_0_will_do() -> None:
    logits = torch.tensor([[300.0, 301.0, -200.0]])
    assert next_tokens(logits, Decoding(temperature=1e-40), range(1), 0).tolist() == [1]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    rows = 20_000
    logits = torch.tensor([0.5, -torch.inf, 2.0, 1.0, -1.0])
    drawn = next_tokens(logits.expand(rows, 5), Decoding(temperature=1.0, seed=3), range(rows), 4)
    share = drawn.bincount(minlength=5) / rows
    # four standard deviations of a share are at most 4 · sqrt(1/4 / rows) = 0.014
    torch.testing.assert_close(share, logits.softmax(-1), rtol=0, atol=0.014)
    assert share[1] == 0


def test_logits_that_are_not_finite_are_an_error(model: CausalLM) -> None:
    ids = torch.tensor([[2, 5, 6]])
    with torch.no_grad():
        model.decoder.embed_positions.weight[6] = float("nan")  # of the second new token's forward
    for decoding in (Decoding(4), Decoding(4, beams=2), Decoding(4, temperature=1.0)):
        with pytest.raises(UserError, match="logits are not finite"):
            generate(model, ids, None, decoding)


def test_what_does_not_fit_is_refused(model: CausalLM) -> None:
    ids = torch.full((1, 20), 5)
    assert generate(model, ids, None, Decoding(12)).size(1) <= 32
    refusals: list[tuple[Tensor, Tensor | None, Decoding, str]] = [
        (ids, None, Decoding(13), "20 tokens and max_new_tokens=13 make 33.* 32 positions: set max_new_tokens=12"),
        (torch.full((1, 32), 5), None, Decoding(1), "32 tokens .* shorten the prompt"),
        (ids, None, Decoding(5, temperature=1.0, top_k=24), "top_k=24 .* 23 tokens"),
        (ids, None, Decoding(5, beams=12), "beams=12 .* 23 tokens: set beams=11"),
        (ids, torch.tensor([[1] * 19 + [0]]), Decoding(5), "on the left"),
    ]
    for prompt, mask, decoding, words in refusals:
        with pytest.raises(UserError, match=words):
            generate(model, prompt, mask, decoding)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"beams": 0}, "beams=0"),
        ({"seed": -1}, "seed=-1"),
        ({"top_k": 5}, "top_k=5 .* temperature=0"),
        ({"top_p": 0.9}, "top_p=0.9 .* temperature=0"),
        ({"beams": 4, "temperature": 1.0}, "beams=4 .* temperature=1.0"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 .* beams=1"),
        ({"beams": 2, "length_penalty": float("inf")}, "length_penalty=inf"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Decoding(**settings)
