"""The documented classes do what transformers' do, at tensor 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opt_parallel.runtime.errors import UserError

STYLES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
}
SHAPE = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.2,
}  # fmt: skip
LONG = pytest.mark.long
# a style of the network and a tensor degree
ALL_CELLS = [("pre-norm", 1), ("350m", 2), ("pre-norm", 2), ("350m", 1)]
CELLS = [pytest.param(*cell, marks=LONG if number > 1 else ()) for number, cell in enumerate(ALL_CELLS)]
ONE_STYLE = pytest.mark.parametrize("folder", ["350m", pytest.param("pre-norm", marks=LONG)], indirect=True)


def paired(values: list[Any]) -> list[Any]:
    """Each value with one of the first two cells, in turns; with all other cells in the long suite."""
    return [
        pytest.param(value, *cell, marks=() if cell == ALL_CELLS[place % 2] else LONG)
        for place, value in enumerate(values)
        for cell in ALL_CELLS
    ]


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 values of order 1 to 10, summed in another order


@pytest.fixture(scope="module", params=STYLES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers writes it."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    model = OPTForCausalLM(OPTConfig(**SHAPE, **STYLES[request.param]))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)  # biases and LayerNorms away from 0 and 1
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


def ids_of(batch: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(4, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def mask_of(batch: int, length: int, seed: int = 6) -> Tensor:
    return torch.randint(0, 2, (batch, length), generator=torch.Generator().manual_seed(seed))


def opened(function: Callable[..., Any], folder: Path, tensor: int, *arguments: Any) -> Any:
    """On the crew: `function(model, …)` with our language model at a tensor degree."""
    from opt_parallel import OPTForCausalLM
    from opt_parallel.parallel.topology import Topology

    with Topology.open(tensor) as topology:
        result = function(OPTForCausalLM.from_pretrained(folder, tensor=topology.tensor), *arguments)
    return result.detach().numpy() if isinstance(result, Tensor) else result


def on_ranks(crew: Any, tensor: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """What every rank returned, which must be the same."""
    first, *others = crew(tensor)(opened, function, folder, tensor, *arguments)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    return first


def everything(model: Any, ids: Tensor, mask: Tensor | None, labels: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        output = model(ids, mask, labels=labels, output_attentions=True, output_hidden_states=True)
    return {
        "loss": output.loss.numpy(),
        "logits": output["logits"].numpy(),
        "hidden_states": [each.numpy() for each in output.hidden_states],
        "attentions": [each.numpy() for each in output.attentions],
        "keys": len(output.keys()),
    }


@pytest.mark.parametrize(("padding", "folder", "tensor"), paired(["none", "left", "right"]), indirect=["folder"])
def test_every_output_is_transformers(crew: Any, folder: Path, padding: str, tensor: int) -> None:
    from transformers import OPTForCausalLM

    ids, mask = ids_of(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, {"none": slice(0), "left": slice(4), "right": slice(-4, None)}[padding]] = 0
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)  # what padding foretells is anybody's guess
    given = None if padding == "none" else mask
    got = on_ranks(crew, tensor, everything, folder, ids, given, labels)
    theirs = OPTForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = theirs(ids, given, labels=labels, output_attentions=True, output_hidden_states=True)
    assert got["keys"] == len(wanted.keys())
    torch.testing.assert_close(torch.tensor(got["loss"]), wanted.loss, **TOLERANCE)
    real = mask.bool()
    torch.testing.assert_close(torch.tensor(got["logits"])[real], wanted.logits[real], **TOLERANCE)
    assert len(got["hidden_states"]) == len(wanted.hidden_states) == SHAPE["num_hidden_layers"] + 1
    assert len(got["attentions"]) == len(wanted.attentions) == SHAPE["num_hidden_layers"]
    for mine, other in zip(got["hidden_states"], wanted.hidden_states, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(torch.tensor(mine)[real], other[real], **TOLERANCE)
    for mine, other in zip(got["attentions"], wanted.attentions, strict=True):
        assert mine.shape == other.shape == (3, 4, 12, 12)
        by_query = torch.tensor(mine).transpose(1, 2)[real], other.transpose(1, 2)[real]
        torch.testing.assert_close(*by_query, **TOLERANCE)


def cached(model: Any, ids: Tensor, mask: Tensor, steps: list[int]) -> Tensor:
    """Hidden logits of all tokens, given piece by piece; the cache has to grow."""
    with torch.no_grad():
        pieces, past = [], None
        for start, stop in zip([0, *steps], [*steps, ids.size(1)], strict=True):
            output = model(ids[:, start:stop], mask[:, :stop], past_key_values=past)
            pieces.append(output.logits)
            past = output.past_key_values
    return torch.cat(pieces, dim=1)


# three at once, and one by one
@pytest.mark.parametrize(("steps", "folder", "tensor"), paired([[9], [9, 10, 11]]), indirect=["folder"])
def test_cached_is_uncached(crew: Any, folder: Path, steps: list[int], tensor: int) -> None:
    ids, mask = ids_of(4, 12), mask_of(4, 12)
    whole = on_ranks(crew, tensor, cached, folder, ids, mask, [])
    torch.testing.assert_close(on_ranks(crew, tensor, cached, folder, ids, mask, steps), whole, **TOLERANCE)


def with_gradient(model: Any, ids: Tensor, steps: list[int]) -> list[Any]:
    """Gradients of the last token's logits, which reach the first tokens through the cache alone."""
    past, start = None, 0
    for stop in [*steps, ids.size(1)]:
        output = model(ids[:, start:stop], past_key_values=past, use_cache=True)
        past, start = output.past_key_values, stop
    output.logits[:, -1].square().sum().backward()
    return [tensor.grad.numpy() for tensor in model.parameters()]


@pytest.mark.parametrize(("folder", "tensor"), CELLS, indirect=["folder"])
def test_gradients_pass_through_the_cache(crew: Any, folder: Path, tensor: int) -> None:
    whole = crew(tensor)(opened, with_gradient, folder, tensor, ids_of(2, 9), [])
    pieces = crew(tensor)(opened, with_gradient, folder, tensor, ids_of(2, 9), [4, 5, 6, 7])
    for mine, other in zip(chain(*pieces), chain(*whole), strict=True):
        # gradients reach hundreds, and float32 carries seven digits of the largest
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(abs(other).max()) + 1e-6)


def logits(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(ids, mask).logits


@pytest.mark.parametrize(("folder", "tensor"), CELLS, indirect=["folder"])
def test_left_padding_changes_nothing(crew: Any, folder: Path, tensor: int) -> None:
    ids = ids_of(2, 10)
    padded = torch.cat([torch.full((2, 32), 1), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 32, dtype=torch.long), torch.ones_like(ids)], dim=1)
    plain = on_ranks(crew, tensor, logits, folder, ids, None)
    shifted = on_ranks(crew, tensor, logits, folder, padded, mask)
    torch.testing.assert_close(shifted[:, -10:], plain, **TOLERANCE)


@pytest.mark.parametrize(("folder", "tensor"), CELLS, indirect=["folder"])
def test_a_row_of_a_batch_is_the_row_alone(crew: Any, folder: Path, tensor: int) -> None:
    ids, mask = ids_of(3, 10), mask_of(3, 10)
    together = on_ranks(crew, tensor, logits, folder, ids, mask)
    for row in range(3):
        alone = on_ranks(crew, tensor, logits, folder, ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)


def from_embeddings(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        embeddings = model.model.decoder.embed_tokens(ids)
        return model(inputs_embeds=embeddings, attention_mask=mask).logits


@pytest.mark.parametrize(("folder", "tensor"), CELLS, indirect=["folder"])
def test_embeddings_stand_for_ids(crew: Any, folder: Path, tensor: int) -> None:
    ids, mask = ids_of(3, 10), mask_of(3, 10)
    got = on_ranks(crew, tensor, from_embeddings, folder, ids, mask)
    torch.testing.assert_close(got, on_ranks(crew, tensor, logits, folder, ids, mask), rtol=0, atol=0)


def at_positions(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, position_ids=positions).logits


@pytest.mark.parametrize(("folder", "tensor"), CELLS, indirect=["folder"])
def test_given_positions(crew: Any, folder: Path, tensor: int) -> None:
    from transformers import OPTForCausalLM

    ids, positions = ids_of(2, 10), torch.arange(20, 30).expand(2, 10)
    with torch.no_grad():
        wanted = OPTForCausalLM.from_pretrained(folder).eval()(ids, position_ids=positions).logits
    got = on_ranks(crew, tensor, at_positions, folder, ids, positions)
    torch.testing.assert_close(torch.tensor(got), wanted, **TOLERANCE)


def without_heads(model: Any, ids: Tensor, dropped: list[tuple[int, int]], by_mask: bool, attentions: bool) -> Tensor:
    """Heads (layer, head) silenced by `head_mask`, or by zeros in the columns of `out_proj` that read them."""
    decoder, head_mask = model.model.decoder, torch.ones(SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"])
    for layer, head in dropped:
        head_mask[layer, head] = 0
        attention = decoder.layers[layer].self_attn
        local = head - attention.group.rank * attention.heads
        if not by_mask and 0 <= local < attention.heads:
            columns = slice(local * attention.head_dim, (local + 1) * attention.head_dim)
            attention.out_proj.weight.data[:, columns] = 0
    with torch.no_grad():
        return model(ids, head_mask=head_mask if by_mask else None, output_attentions=attentions).logits


@pytest.mark.parametrize(("attentions", "folder", "tensor"), paired([False, True]), indirect=["folder"])
def test_a_masked_head_is_a_head_that_nobody_reads(crew: Any, folder: Path, attentions: bool, tensor: int) -> None:
    ids, dropped = ids_of(2, 10), [(0, 1), (2, 0), (2, 3)]
    masked = on_ranks(crew, tensor, without_heads, folder, ids, dropped, True, attentions)
    unread = on_ranks(crew, tensor, without_heads, folder, ids, dropped, False, attentions)
    torch.testing.assert_close(masked, unread, **TOLERANCE)
    assert abs(masked - on_ranks(crew, tensor, logits, folder, ids, None)).max() > 0.1


def one_mask_for_all_layers(model: Any, ids: Tensor) -> list[Any]:
    factors = torch.tensor([1.0, 0.5, 0.0, 2.0])
    with torch.no_grad():
        short, full = model(ids, head_mask=factors), model(ids, head_mask=factors.expand(3, 4))
    return [short.logits.numpy(), full.logits.numpy()]


@ONE_STYLE
def test_a_head_mask_without_layers_serves_all(crew: Any, folder: Path) -> None:
    short, full = on_ranks(crew, 2, one_mask_for_all_layers, folder, ids_of(2, 10))
    torch.testing.assert_close(short, full, rtol=0, atol=0)


def shapes_of_tuple(model: Any, ids: Tensor) -> list[Any]:
    plain = model(ids, use_cache=False, return_dict=False)
    more = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    kept = model(ids).past_key_values
    return [[tuple(each.shape) for each in plain], len(more), more[0].dim(), kept.length]


@ONE_STYLE
def test_tuples(crew: Any, folder: Path) -> None:
    got = on_ranks(crew, 1, shapes_of_tuple, folder, ids_of(2, 10))
    assert got == [[(2, 10, 131)], 4, 0, 10]  # loss, logits, past_key_values, hidden_states


def refusals(model: Any, ids: Tensor) -> list[str]:
    said = []
    for wrong in (
        {},
        {"input_ids": ids, "inputs_embeds": torch.zeros(2, 10, 48)},
        {"input_ids": ids, "attention_mask": torch.ones(2, 9)},
        {"input_ids": ids_of(1, 65)},
        {"input_ids": ids + 200},
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the messages are compared by the caller
            model(**wrong)
        said.append(str(caught.value))
    for settings in (
        {"input_ids": ids + 200},
        {"attention_mask": torch.ones(2, 9)},
        {"attention_mask": torch.ones(1, 10)},
        {"temperature": 0.5},
        {"top_k": 5},
        {"do_sample": True, "temperature": 0.0},
    ):
        with pytest.raises((ValueError, UserError)) as caught:
            model.generate(**{"input_ids": ids, **settings})
        said.append(str(caught.value))
    return said


@ONE_STYLE
def test_refusals(crew: Any, folder: Path) -> None:
    said = on_ranks(crew, 1, refusals, folder, ids_of(2, 10))
    wanted = ["exactly one", "exactly one", "(2, 9)", "max_position_embeddings=64", "vocab_size − 1 = 130"]
    wanted += [
        "vocab_size − 1 = 130",
        "(2, 9)",
        "(1, 10)",
        "temperature=0.5",
        "top_k=5 affects sampling only: set do_sample=True",
        "is greedy",
    ]
    assert all(words in message for words, message in zip(wanted, said, strict=True)), said


def in_training(model: Any, ids: Tensor) -> list[Any]:
    model.train()
    for block in model.model.decoder.layers:
        block.dropout = 0.3
    losses = [model(ids, labels=ids).loss.item() for _ in range(2)]
    model.model.samples = model.model.forwards = 0
    again = model(ids, labels=ids).loss.item()
    return [*losses, again, model(ids, use_cache=False).past_key_values, model.eval()(ids, labels=ids).loss.item()]


@ONE_STYLE
def test_dropout_in_training_mode(crew: Any, folder: Path) -> None:
    runs = [on_ranks(crew, tensor, in_training, folder, ids_of(2, 10)) for tensor in (1, 2)]
    first, second, again, cache, evaluated = runs[0]
    assert len({first, second, evaluated}) == 3
    assert first == again
    assert cache is None
    assert runs[1][0] == pytest.approx(first, rel=1e-5)
    assert runs[1][4] == pytest.approx(evaluated, rel=1e-5)


def generated(model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> list[Any]:
    return model.generate(ids, attention_mask=mask, **settings).tolist()


SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "drawn": {"do_sample": True}}


@pytest.mark.parametrize(("how", "folder", "tensor"), paired(list(SETTINGS)), indirect=["folder"])
def test_generate(crew: Any, folder: Path, how: str, tensor: int) -> None:
    from transformers import OPTForCausalLM

    ids, mask = ids_of(3, 9), torch.ones(3, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 1, 0
    (first, *others) = crew(tensor)(opened, partial(generated, **SETTINGS[how]), folder, tensor, ids, mask)
    assert all(other == first for other in others)
    if how == "drawn":
        other_seed = crew(tensor)(opened, partial(generated, do_sample=True, seed=1), folder, tensor, ids, mask)
        assert other_seed[0] != first
    else:
        theirs = OPTForCausalLM.from_pretrained(folder).eval()
        wanted = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **SETTINGS[how])
        assert first == wanted.tolist()


def overfit(tensor: int) -> tuple[list[float], list[int]]:
    """On the crew: 120 steps on 1 … 19, over and over; the losses, and what greedy decoding makes of the beginning."""
    from opt_parallel import OPTConfig, OPTForCausalLM, Topology

    config = OPTConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, dropout=0.1, attention_dropout=0.1, pad_token_id=0, eos_token_id=98,
    )  # fmt: skip
    ids = (torch.arange(57) % 19 + 1)[None].expand(4, 57)
    with Topology.open(tensor) as topology:
        model = OPTForCausalLM(config, tensor=topology.tensor, seed=1).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(120):
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        written = model.generate(ids[:1, :5], max_new_tokens=52)
    return losses, written[0].tolist()


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.long
def test_overfitting(crew: Any, tensor: int) -> None:
    for losses, written in crew(tensor)(overfit, tensor):
        assert losses[-1] < 0.1 * losses[0]
        assert written == (torch.arange(57) % 19 + 1).tolist()


def saved(folder: str, tensor: int, output: str, name: str, dtype: str) -> None:
    """On the crew: read at a tensor degree, written again."""
    import opt_parallel
    from opt_parallel.parallel.topology import Topology

    with Topology.open(tensor) as topology:
        model = getattr(opt_parallel, name).from_pretrained(folder, tensor=topology.tensor, dtype=getattr(torch, dtype))
        model.save_pretrained(output, max_shard_size="20KB")


@pytest.mark.parametrize(("name", "folder", "tensor"), paired(["OPTModel", "OPTForCausalLM"]), indirect=["folder"])
def test_what_we_save_is_what_transformers_saved(
    crew: Any, folder: Path, tmp_path: Path, name: str, tensor: int
) -> None:
    import transformers
    from safetensors.torch import load_file

    crew(tensor)(saved, str(folder), tensor, str(tmp_path / "saved"), name, "float32")
    theirs = getattr(transformers, name)
    before = theirs.from_pretrained(folder).state_dict()
    loaded, info = theirs.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 1
    assert {key for file in files for key in load_file(file)} == before.keys() - {"lm_head.weight"}
    for key, values in loaded.state_dict().items():
        torch.testing.assert_close(values, before[key], rtol=0, atol=0)


@ONE_STYLE
def test_saving_never_overwrites(crew: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssertionError, match=r"UserError.* exists and has the .* of a model: remove it"):
        crew(2)(saved, str(folder), 2, str(tmp_path), "OPTModel", "float32")


@ONE_STYLE
def test_half_precision_is_kept(crew: Any, folder: Path, tmp_path: Path) -> None:
    from transformers import OPTForCausalLM

    crew(2)(saved, str(folder), 2, str(tmp_path / "saved"), "OPTForCausalLM", "bfloat16")
    assert OPTForCausalLM.from_pretrained(tmp_path / "saved").dtype is torch.bfloat16
