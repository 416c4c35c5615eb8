"""How good a classifier's decisions are: counts that add up over batches and ranks, and the figures that follow.

A tally is an array of float64 whose meaning hangs on the problem:
    single label    (N, N): examples of each label (row) by the label decided for (column), the confusion matrix
    multi label     (N + 1, 3): of each label true positives, false positives, false negatives; in the last row examples
                    with every label right, and examples
    regression      (N, 6): of each number y and prediction x: examples, Σx, Σy, Σx², Σy², Σxy
"""

from __future__ import annotations

import math

import numpy as np

from opt_parallel.config.model import ProblemType


def tally(scores: np.ndarray, labels: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """What `scores` (B, N) add; `labels` are (B,) or (B, N), all of them of examples that count."""
    scores, number = scores.astype(np.float64), scores.shape[1]
    if problem_type is ProblemType.single_label_classification:
        cells = labels * number + scores.argmax(axis=1)
        return np.bincount(cells, minlength=number * number).reshape(number, number).astype(np.float64)
    if problem_type is ProblemType.multi_label_classification:
        decided, true = scores > 0, labels > 0.5  # a sigmoid over one half
        counts = [(decided & true).sum(axis=0), (decided & ~true).sum(axis=0), (~decided & true).sum(axis=0)]
        whole = [(decided == true).all(axis=1).sum(), len(labels), 0]
        return np.vstack([np.stack(counts, axis=1), whole]).astype(np.float64)
    y = labels.astype(np.float64)
    sums = [each.sum(axis=0) for each in (scores, y, scores**2, y**2, scores * y)]
    return np.stack([np.full(number, float(len(y))), *sums], axis=1)


def figures(tallied: np.ndarray, problem_type: ProblemType) -> dict[str, float]:
    """The figures of a whole tally, NaN where they are not defined.

    Single label: `accuracy`; `f1_macro`, the mean over the labels that occur or are decided for; `f1` of two labels, of
    the second, which counts as positive; `matthews`. Multi label: `accuracy` of all labels at once, `f1_micro`,
    `f1_macro`. Regression: `mse` and `pearson`, means over the numbers."""
    if problem_type is ProblemType.regression:
        return _of_sums(tallied)
    if problem_type is ProblemType.multi_label_classification:
        counts, (right, examples, _) = tallied[:-1], tallied[-1]
        micro = float(_f1(counts.sum(axis=0, keepdims=True))[0])
        return {"accuracy": right / examples, "f1_micro": micro, "f1_macro": float(_f1(counts).mean())}
    true, decided, right = tallied.sum(axis=1), tallied.sum(axis=0), tallied.diagonal()
    each = _f1(np.stack([right, decided - right, true - right], axis=1))
    found = {
        "accuracy": float(right.sum() / tallied.sum()),
        "f1_macro": float(each[(true + decided) > 0].mean()),
        "matthews": matthews(tallied),
    }
    return found | ({"f1": float(each[1])} if len(tallied) == 2 else {})


def matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of a confusion matrix (N, N), for N labels as Gorodkin 2004, "Comparing two K-category
    assignments by a K-category correlation coefficient", gives it; 0 where one side is constant.

    With s examples, c of them right, t_k of label k and p_k decided for it:
    (c·s − Σ p_k t_k) / √((s² − Σ p_k²) (s² − Σ t_k²))"""
    s, c = confusion.sum(), confusion.trace()
    t, p = confusion.sum(axis=1), confusion.sum(axis=0)
    spread = (s * s - p @ p) * (s * s - t @ t)
    return float((c * s - p @ t) / math.sqrt(spread)) if spread > 0 else 0.0


def _f1(counts: np.ndarray) -> np.ndarray:
    """2 tp / (2 tp + fp + fn) of each row, 0 where nothing was there or decided for (van Rijsbergen 1979)."""
    tp, fp, fn = counts.T
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


def _of_sums(sums: np.ndarray) -> dict[str, float]:
    n, x, y, xx, yy, xy = sums.T
    mse = (xx - 2 * xy + yy) / n
    spread = (xx - x * x / n) * (yy - y * y / n)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.where(spread > 0, (xy - x * y / n) / np.sqrt(spread), np.nan)
    return {"mse": float(mse.mean()), "pearson": float(pearson.mean())}
