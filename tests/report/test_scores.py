"""A classifier's figures: worked by hand, and alike however the examples are parted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opt_parallel.config.model import ProblemType
from opt_parallel.report.scores import figures, matthews, tally

SINGLE, MULTI = ProblemType.single_label_classification, ProblemType.multi_label_classification
REGRESSION = ProblemType.regression


def scores_for(decided: list[int], number: int) -> np.ndarray:
    return np.eye(number, dtype=np.float32)[decided]


def test_two_labels() -> None:
    true, decided = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    counts = tally(scores_for(decided, 2), np.array(true), SINGLE)
    assert counts.tolist() == [[4, 1], [1, 2]]  # true labels in rows
    found = figures(counts, SINGLE)
    # of the second label 2 found, 1 too many, 1 missed: F1 = 4/6; of the first 4, 1, 1: 8/10
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["accuracy"] == 6 / 8
    # (tp·tn − fp·fn) / √((tp+fp)(tp+fn)(tn+fp)(tn+fn)), Matthews' own for two
    assert found["matthews"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


def test_three_labels_and_one_that_does_not_occur() -> None:
    true, decided = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    counts = tally(scores_for(decided, 4), np.array(true), SINGLE)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    found = figures(counts, SINGLE)
    each = [2 * 1 / (2 + 1 + 1), 2 * 2 / (4 + 1 + 0), 2 * 1 / (2 + 0 + 1)]
    assert found["f1_macro"] == pytest.approx(sum(each) / 3)
    assert "f1" not in found
    # s = 6, c = 4, t = (2, 2, 2), p = (2, 3, 1)
    assert found["matthews"] == pytest.approx((4 * 6 - 12) / math.sqrt((36 - 14) * (36 - 12)))
    assert matthews(np.array([[3.0, 0], [5, 0]])) == 0.0
    assert matthews(np.array([[5.0, 1], [0, 2]])) == pytest.approx(2 * 5 / math.sqrt(3 * 2 * 6 * 5))


def test_any_labels() -> None:
    scores = np.array([[2.0, -1, 3], [-2, -1, 0.5], [1, 1, -1]], np.float32)
    true = np.array([[1.0, 0, 1], [0, 1, 1], [0, 1, 0]], np.float32)
    found = figures(tally(scores, true, MULTI), MULTI)
    assert found["accuracy"] == pytest.approx(1 / 3)  # all labels of the first alone are right
    assert found["f1_micro"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_numbers() -> None:
    scores, true = np.array([[1.0], [2], [3], [5]]), np.array([[2.0], [1], [3], [7]])
    found = figures(tally(scores, true, REGRESSION), REGRESSION)
    assert found["mse"] == pytest.approx((1 + 1 + 0 + 4) / 4)
    assert found["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], true[:, 0])[0, 1])
    assert math.isnan(figures(tally(scores, np.ones((4, 1)), REGRESSION), REGRESSION)["pearson"])


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_tallies_add_up(problem: ProblemType) -> None:
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(20, 3))
    true = generator.integers(3, size=20) if problem is SINGLE else generator.integers(2, size=(20, 3)).astype(float)
    parts = sum(tally(scores[a:b], true[a:b], problem) for a, b in ((0, 7), (7, 7), (7, 20)))
    assert figures(np.asarray(parts), problem) == pytest.approx(figures(tally(scores, true, problem), problem))
