"""Metrics of classification and regression, computed from counts that are summed over batches and ranks.

These counts, a tally, are a float64 array whose form depends on the problem:
    single label    (N, N), the confusion matrix; rows are true labels and columns are predicted labels
    multi label     (N + 1, 3), for each label the numbers of true positives, false positives and false negatives; the
                    last row holds the number of examples with all labels right, the number of examples, and 0
    regression      (N, 6), for each target y with prediction x the number of examples, Σx, Σy, Σx², Σy² and Σxy
"""

from __future__ import annotations

import math

import numpy as np

from opt_parallel.config.model import ProblemType


def tally(scores: np.ndarray, labels: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """The tally of `scores` (B, N) against `labels` (B,) or (B, N), over all B rows."""
    scores, number = scores.astype(np.float64), scores.shape[1]
    if problem_type is ProblemType.single_label_classification:
        cells = labels * number + scores.argmax(axis=1)
        return np.bincount(cells, minlength=number * number).reshape(number, number).astype(np.float64)
    if problem_type is ProblemType.multi_label_classification:
        decided, true = scores > 0, labels > 0.5  # sigmoid(score) > 0.5
        counts = [(decided & true).sum(axis=0), (decided & ~true).sum(axis=0), (~decided & true).sum(axis=0)]
        totals = [(decided == true).all(axis=1).sum(), len(labels), 0]
        return np.vstack([np.stack(counts, axis=1), totals]).astype(np.float64)
    y = labels.astype(np.float64)
    sums = [each.sum(axis=0) for each in (scores, y, scores**2, y**2, scores * y)]
    return np.stack([np.full(number, float(len(y))), *sums], axis=1)


def figures(tallied: np.ndarray, problem_type: ProblemType) -> dict[str, float]:
    """The metrics of a tally that is summed over all batches and ranks. An undefined metric is NaN.

    A single-label problem has `accuracy`, `matthews` and `f1_macro`, the mean over labels that occur or are predicted.
    With two labels, a single-label problem also has `f1` of the second label, which is the positive label. A
    multi-label problem has `f1_micro`, `f1_macro` and `accuracy`, the share of examples with all labels right. A
    regression has `mse` and `pearson`, which are means over the N targets."""
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
    """Matthews correlation coefficient of a confusion matrix (N, N), generalised to N labels by Gorodkin 2004,
    "Comparing two K-category assignments by a K-category correlation coefficient". The coefficient is 0 if all labels
    or all predictions are equal.

    With s examples, c right predictions, t_k examples with label k and p_k predictions of label k, the coefficient is
    (c·s − Σ p_k t_k) / √((s² − Σ p_k²) (s² − Σ t_k²))"""
    s, c = confusion.sum(), confusion.trace()
    t, p = confusion.sum(axis=1), confusion.sum(axis=0)
    spread = (s * s - p @ p) * (s * s - t @ t)
    return float((c * s - p @ t) / math.sqrt(spread)) if spread > 0 else 0.0


def _f1(counts: np.ndarray) -> np.ndarray:
    """The F1 score 2 tp / (2 tp + fp + fn) of each row (van Rijsbergen 1979). A label without examples and predictions
    has an F1 score of 0."""
    tp, fp, fn = counts.T
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


def _of_sums(sums: np.ndarray) -> dict[str, float]:
    n, x, y, xx, yy, xy = sums.T
    mse = (xx - 2 * xy + yy) / n
    spread = (xx - x * x / n) * (yy - y * y / n)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.where(spread > 0, (xy - x * y / n) / np.sqrt(spread), np.nan)
    return {"mse": float(mse.mean()), "pearson": float(pearson.mean())}
