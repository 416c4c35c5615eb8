"""What is odd in the values of a metaseq checkpoint: not finite, very large, or different in two model parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

LARGE = 100.0  # Trained weights of OPT are far below; a damaged shard of OPT-175B held values of 50,000.


@dataclass
class Findings:
    """What this rank has found. The numbers of values are counted for each part of a tensor, by the name and the index
    of the part. `differing` has the largest difference between the copies in two model parts."""

    not_finite: dict[tuple[str, int], int] = field(default_factory=dict)
    large: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)
    differing: dict[str, float] = field(default_factory=dict)

    def look_at(self, name: str, index: int, values: Tensor) -> None:
        """Count the odd values in part `index` of a tensor."""
        if not values.numel():
            return
        low, high = (float(end) for end in values.aminmax())
        if low >= -LARGE and high <= LARGE:  # false for NaN
            return
        finite = values.isfinite()
        if wrong := values.numel() - int(finite.sum()):
            self.not_finite[name, index] = wrong
        sizes = values.float().abs().masked_fill_(~finite, 0.0)
        if count := int((sizes > LARGE).sum()):
            self.large[name, index] = (count, float(sizes.max()))

    def differs(self, name: str, difference: float) -> None:
        """Keep the difference of two copies of a tensor, if it is the largest one."""
        self.differing[name] = max(self.differing.get(name, 0.0), difference)

    def clear(self) -> None:
        """Forget everything that was found."""
        for found in (self.not_finite, self.large, self.differing):
            found.clear()


def warnings_of(folder: Path, ranks: Iterable[Findings]) -> list[str]:
    """A line for each kind of odd values that the ranks have found."""
    together = Findings()
    for found in ranks:
        together.not_finite |= found.not_finite
        together.large |= found.large
        for name, difference in found.differing.items():
            together.differs(name, difference)
    lines = []
    if named := _counted({key: (count, 0.0) for key, count in together.not_finite.items()}):
        tensors = [f"{name} ({count:,})" for name, (count, _) in named.items()]
        lines.append(f"has values that are not finite, in {listed(tensors)}")
    if named := _counted(together.large):
        tensors = [f"{name} ({count:,}, up to {largest:.4g})" for name, (count, largest) in named.items()]
        lines.append(
            f"has values beyond {LARGE:g}, in {listed(tensors)}: trained weights of OPT are smaller, so compare the "
            "MD5 sums of the files"
        )
    if together.differing:
        name = max(together.differing, key=lambda name: together.differing[name])
        lines.append(
            f"holds {len(together.differing)} tensors of which the model parts have different copies, by up to "
            f"{together.differing[name]:.3g} in {name}: the copies of part 0 are used"
        )
    return [f"warning: {folder} {line}" for line in lines]


def _counted(parts: dict[tuple[str, int], tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """The number and the size of values for each tensor, from those of its parts."""
    found: dict[str, tuple[int, float]] = {}
    for (name, _), (count, largest) in sorted(parts.items()):
        before = found.get(name, (0, 0.0))
        found[name] = (before[0] + count, max(before[1], largest))
    return found


def listed(names: list[str]) -> str:
    """The first five names, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
