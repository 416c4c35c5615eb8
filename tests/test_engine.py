"""The same run in every layout: losses, gradient norms and weights of one plain process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from layouts import STYLE_350M, Layout, assemble, run_for, train, train_plainly

# float32 sums in another order, carried through five Adam steps
RELATIVE = 1e-5

LAYOUTS = [
    Layout(1, 1, 0, 1), Layout(1, 1, 0, 2, recompute=True), Layout(2, 1, 0, 2), Layout(2, 2, 0, 1),
    Layout(4, 1, 0, 1, recompute=True), Layout(1, 2, 0, 1),
    Layout(1, 1, 1, 2), Layout(2, 1, 1, 1), Layout(2, 2, 1, 2, recompute=True), Layout(4, 1, 1, 2),
    Layout(1, 2, 1, 2, offload=True), Layout(2, 2, 1, 1, offload=True),
    Layout(1, 2, 2, 1), Layout(2, 1, 2, 2, recompute=True), Layout(2, 2, 2, 1), Layout(4, 1, 2, 1, offload=True),
    Layout(2, 2, 2, 2, offload=True),
    Layout(1, 1, 3, 1), Layout(1, 2, 3, 2), Layout(2, 2, 3, 1), Layout(2, 2, 3, 2, recompute=True),
    Layout(4, 1, 3, 2), Layout(2, 2, 3, 1, offload=True), Layout(1, 2, 3, 1, recompute=True, offload=True),
]  # fmt: skip


@functools.cache
def truth(style: str) -> Any:
    return train_plainly(run_for(Layout(), STYLE_350M if style == "350m" else None))


def compare(crew: Any, layout: Layout, style: str) -> None:
    run = run_for(layout, STYLE_350M if style == "350m" else None)
    answers = crew(layout.world)(train, run)
    losses, norms, weights = truth(style)
    for rank_losses, rank_norms, _ in answers:
        assert rank_losses == pytest.approx(losses, rel=RELATIVE)
        assert rank_norms == pytest.approx(norms, rel=RELATIVE)
    assert min(norms) > run.optimizer.clip, "clipping must be active"
    whole = assemble([parts for _, _, parts in answers])
    assert whole.keys() == weights.keys()
    for name, expected in weights.items():
        difference = float(torch.linalg.vector_norm(whole[name] - expected))
        # biases began at zero and have moved a few learning rates: they are measured against the weights beside them
        scale = max(float(torch.linalg.vector_norm(expected)), run.model.std * expected.numel() ** 0.5)
        assert difference <= RELATIVE * scale, f"{name}: {difference / scale:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_is_the_run_of_one_plain_process(crew: Any, layout: Layout) -> None:
    compare(crew, layout, "standard")
