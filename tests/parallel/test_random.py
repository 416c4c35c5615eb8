"""Dropout as a counter hash: uniform, independent, pinned, and the same in every layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opt_parallel.parallel import compiled
from opt_parallel.parallel.random import Draw, hash_dropped, number
from opt_parallel.parallel.topology import ALONE, Group

DRAW = Draw(seed=1, step=3, micro=0, data_rank=0, samples=torch.arange(64))


def test_rate_and_independence() -> None:
    rate = 0.1
    dropped = hash_dropped(torch.arange(200), 96, 128, rate, torch.tensor(12345, dtype=torch.int32)).double() - rate
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(float(dropped.mean())) < 5 * deviation / dropped.numel() ** 0.5
    for dims in ((1, 2), (0, 2), (0, 1)):  # per sample, per position, per channel
        means = dropped.mean(dims)
        expected = deviation / (dropped.numel() / means.numel()) ** 0.5
        assert float(means.std()) == pytest.approx(expected, rel=0.25)
    for dim in range(3):
        rows = dropped.transpose(0, dim).flatten(1)
        correlation = rows @ rows.T / rows.size(1) / deviation**2
        correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < 6 / rows.size(1) ** 0.5


def test_scaled_and_expected_value_kept() -> None:
    ones = torch.ones(64, 32, 48)
    dropped = DRAW.dropout(ones, 0.25, layer=0, site=0)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    assert DRAW.dropout(ones, 0.0, 0, 0) is ones


def test_pinned() -> None:
    """The stream may never change unnoticed: a resumed run would see other masks."""
    dropped = (
        hash_dropped(torch.tensor([0, 1, 2**40 + 3]), 4, 1000, 0.5, torch.tensor(7, dtype=torch.int32))
        .sum((1, 2))
        .tolist()
    )
    assert dropped == [1924, 2021, 1991]
    assert [DRAW.drops_layer(0.5, layer) for layer in range(12)] == PINNED_LAYERS


PINNED_LAYERS = [False, True, False, True, False, True, False, True, True, False, False, True]


def test_depends_on_the_sample_and_not_on_the_micro_batch() -> None:
    hidden = torch.ones(64, 8, 16)
    whole = DRAW.dropout(hidden, 0.3, 2, 1)
    part = dataclasses.replace(DRAW, micro=5, data_rank=3, step=9, samples=torch.arange(16, 24))
    assert torch.equal(part.dropout(hidden[:8], 0.3, 2, 1), whole[16:24])
    for other in (DRAW.dropout(hidden, 0.3, 2, 0), DRAW.dropout(hidden, 0.3, 3, 1),
                  dataclasses.replace(DRAW, seed=2).dropout(hidden, 0.3, 2, 1),
                  dataclasses.replace(DRAW, samples=DRAW.samples + 2**32).dropout(hidden, 0.3, 2, 1)):  # fmt: skip
        assert not torch.equal(other, whole)


def test_a_part_of_the_positions_drops_what_the_whole_drops() -> None:
    hidden = torch.ones(64, 8, 16, requires_grad=True)
    whole = DRAW.dropout(hidden, 0.3, 2, 1)
    whole.backward(torch.ones_like(whole))
    assert hidden.grad is not None
    tail = hidden.detach()[:, 5:].requires_grad_()
    part = dataclasses.replace(DRAW, first=5).dropout(tail, 0.3, 2, 1)
    part.backward(torch.ones_like(part))
    assert torch.equal(part, whole[:, 5:])
    assert tail.grad is not None
    assert torch.equal(tail.grad, hidden.grad[:, 5:])


def test_layerdrop_rate() -> None:
    steps = [dataclasses.replace(DRAW, step=step) for step in range(500)]
    decisions = [draw.drops_layer(0.2, layer) for draw in steps for layer in range(8)]
    assert sum(decisions) / len(decisions) == pytest.approx(0.2, abs=0.03)
    assert not DRAW.drops_layer(0.0, 0)


def test_attention_seed_depends_on_everything_it_names() -> None:
    def drawn(draw: Draw, layer: int, group: Group) -> float:
        draw.seed_attention(layer, group, torch.device("cpu"))
        return float(torch.rand(()))

    first = drawn(DRAW, 0, ALONE)
    assert drawn(DRAW, 0, ALONE) == first
    others = [dataclasses.replace(DRAW, **{name: 7}) for name in ("seed", "step", "micro", "data_rank")]
    values = [first, drawn(DRAW, 1, ALONE), drawn(DRAW, 0, Group(None, 1, 2)), *(drawn(d, 0, ALONE) for d in others)]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.long
def test_compiled_is_bit_for_bit_the_same(dtype: torch.dtype) -> None:
    """A large tensor's dropout is compiled. The dropped elements do not depend on this, nor on the machine. The second
    length is compiled for all shapes."""
    generator = torch.Generator().manual_seed(4)
    draw = dataclasses.replace(DRAW, samples=DRAW.samples * 3 + 2**40 - 5)
    for site, length in ((0, 64), (1, 64), (1, 72), (0, 65)):
        shape = (64, length, 131)  # 131: no vector's multiple
        hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        upstream = torch.randn(shape, generator=generator).to(dtype)
        assert hidden.numel() >= compiled.COMPILED_FROM > hidden[:16].numel()
        whole = draw.dropout(hidden, 0.3, 2, site)
        whole.backward(upstream)
        for start in range(0, 64, 16):
            part = dataclasses.replace(draw, samples=draw.samples[start : start + 16])
            few = hidden.detach()[start : start + 16].requires_grad_()
            eager = part.dropout(few, 0.3, 2, site)
            eager.backward(upstream[start : start + 16])
            assert torch.equal(eager, whole[start : start + 16])
            assert torch.equal(few.grad, hidden.grad[start : start + 16])


def test_attention_is_seeded_as_by_torch_but_on_one_device_only() -> None:
    DRAW.seed_attention(3, ALONE, torch.device("cpu"))
    drawn = torch.rand(4)
    torch.manual_seed(number("attention", 1, 3, 0, 0, 0, 3, bits=63))
    assert torch.equal(torch.rand(4), drawn)
    before = torch.cuda._lazy_seed_tracker.get_calls()
    DRAW.seed_attention(3, ALONE, torch.device("cpu"))
    after = torch.cuda._lazy_seed_tracker.get_calls()
    assert [id(call) for call in after] == [id(call) for call in before], "CUDA's generators would be seeded too"
