"""How far plans are from published measurements, in a line for under every plan. A test computes it again."""

from __future__ import annotations

from opt_parallel.planning.validate import Compared, mean_of

LINE = (
    "memory within 2.3% mean, 17.2% worst of 21 published numbers; "
    "time within 3.9% mean, 13.4% worst of 32 published numbers"
)


def of(found: list[Compared]) -> str:
    """The line, from the judged rows of `found`."""
    texts = []
    for what in ("memory", "time"):
        some = [each for each in found if each.what == what and not each.fitted]
        worst = max(abs(each.error) for each in some)
        texts.append(f"{what} within {mean_of(some):.1%} mean, {worst:.1%} worst of {len(some)} published numbers")
    return "; ".join(texts)
