"""Stochastic rounding: right on average, exact where it can be, and the same in every layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from opt_parallel.parallel import compiled
from opt_parallel.parallel.rounding import Piece, addresses, keys, rounded
from opt_parallel.parallel.shard import Constant, Shard

ELEMENTS = 200_000
NUMBERS = torch.arange(ELEMENTS) + 2**40


def rounded_up(value: float, key: Tensor) -> Tensor:
    """Which of the elements with this value are rounded away from zero, after a check that all are neighbours of it."""
    values = torch.full((1, ELEMENTS), value)
    low = values[0, :1].view(torch.int32) & -0x10000
    neighbours = torch.cat([low, low + 0x10000]).view(torch.float32).tolist()
    found = rounded(values, NUMBERS, key[None])[0].float()
    assert set(found.unique().tolist()) <= set(neighbours)
    return found == neighbours[1]


@pytest.mark.parametrize("fraction", [0.003, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1.0, -3e-20])
def test_right_on_average(fraction: float, scale: float) -> None:
    """Between 1 and the next bf16 value, 1 + 2^-7."""
    value = (torch.tensor(1.0).mul(scale).bfloat16().float() * (1 + fraction * 2**-7)).item()
    bits = int(torch.tensor(value).view(torch.int32)) & 0xFFFF
    expected = bits / 2**16
    for key in keys(torch.tensor(7.0), 3):
        deviation = (expected * (1 - expected) / ELEMENTS) ** 0.5
        assert abs(rounded_up(value, key).double().mean().item() - expected) < 5 * deviation


def test_bf16_values_do_not_change() -> None:
    values = torch.cat([torch.randn(1000) * 10.0**power for power in (-30, -3, 0, 30)]).bfloat16()
    values = torch.cat([values, torch.tensor([0.0, -0.0], dtype=torch.bfloat16)])
    again = rounded(values.float()[None], NUMBERS[: len(values)], keys(torch.tensor(1.0), 1))
    assert torch.equal(again[0].view(torch.int16), values.view(torch.int16))


def test_roundings_are_independent() -> None:
    """Of the three tensors in a step, of successive steps, and of neighbouring elements."""
    keyed = [*keys(torch.tensor(1.0), 3), *keys(torch.tensor(2.0), 3)]
    ups = [rounded_up(1 + 2**-8, key).double() - 0.5 for key in keyed]
    limit = 5 * 0.25 / ELEMENTS**0.5
    for one, other in itertools.combinations(ups, 2):
        assert abs((one * other).mean().item()) < limit
    for distance in (1, 2, 64):
        assert abs((ups[0][distance:] * ups[0][:-distance]).mean().item()) < limit


def test_pinned() -> None:
    """The bits may never change unnoticed, since a resumed run would round differently."""
    values = torch.linspace(1, 2, 1000)
    numbers = torch.arange(1000) + 123456789012345
    up = rounded(values.expand(3, -1).contiguous(), numbers, keys(torch.tensor(3.0), 3)) > values
    assert up.sum(1).tolist() == [505, 505, 493]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_addresses_do_not_depend_on_the_layout(dim: int, count: int) -> None:
    """A tensor that is split into parts, each of which is cut at any place into flat tensors."""
    shape = (3, 6, 5)
    expected = torch.arange(90).view(shape) + 1000
    for index in range(count):
        shard = Shard(shape, dim, index, count, Constant(0), False)
        size = torch.Size(shard.local_shape).numel()
        for cut in (0, 7, size // 2):
            flats = [
                addresses([Piece(1000, shard, start, 3, stop - start)], 0, stop - start + 5, torch.device("cpu"))
                for start, stop in ((0, cut), (cut, size))
            ]
            assert all(not flat[:3].any() and not flat[-2:].any() for flat in flats)  # padding
            local = torch.cat([flat[3:-2] for flat in flats]).view(shard.local_shape)
            assert torch.equal(local[shard.real], expected[shard.range])


def test_addresses_of_several_pieces_in_chunks() -> None:
    shard = Shard((4, 5), 0, 0, 1, Constant(0), False)
    pieces = [Piece(100, shard, 13, 0, 7), Piece(1000, shard, 0, 7, 20)]
    whole = addresses(pieces, 0, 27, torch.device("cpu"))
    assert whole.tolist() == [*range(113, 120), *range(1000, 1020)]
    chunks = [addresses(pieces, begin, min(begin + 4, 27), torch.device("cpu")) for begin in range(0, 27, 4)]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.long
def test_compiled_is_bit_for_bit_the_same() -> None:
    """Large tensors are rounded by a compiled function, which takes a quarter of a minute to compile."""
    values, numbers, rounding = torch.randn(2, 2**19), torch.arange(2**19) + 2**60, keys(torch.tensor(9.0), 2)
    small = compiled.COMPILED_FROM // 4
    parts = [rounded(*each, rounding) for each in zip(values.split(small, 1), numbers.split(small), strict=True)]
    assert torch.equal(rounded(values, numbers, rounding), torch.cat(parts, 1))
