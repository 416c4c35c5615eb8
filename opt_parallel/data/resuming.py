"""Where the sources of a run go on that was saved with other sources, weights, rows or another seed.

A source goes on behind the samples that it gave, whatever stands beside it now, and in its own order: its place is one
number. The mixture of the new weights begins at the sample of the run where the change was made. docs/resuming.md has
the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from opt_parallel.config.data import DataConfig
from opt_parallel.config.run import Run
from opt_parallel.data.prepare import PreparedSource
from opt_parallel.data.samples.mixture import Cycle, turns_of
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.log import say


def resumed_clock(run: Run, sources: Sequence[PreparedSource], manifest: dict[str, Any]) -> Clock:
    """The clock of a checkpoint's manifest, as `run`, which has `sources` now, goes on from it. What changed is said,
    and what cannot go on exactly is warned of."""
    clock = Clock.saved(manifest["clock"])
    then = {each.name: Fraction(each.weight) for each in _config(manifest).train_sources}
    former = _former(sources, clock, list(then), manifest.get("text") or {})
    _warn(run, sources, former, manifest)
    samples = _samples_for_one(run, manifest)
    weights = [source.weight for source in sources]
    same = [*former.values()] == [*then] and turns_of([*then.values()]) == turns_of(weights)
    if same and samples == 1 and [*former] == [*then]:
        return clock
    stood = dict(clock.taken)  # of all sources there ever were
    if not same or samples != 1:
        turns = Cycle(tuple(then.values())).taken(clock.samples - clock.mixed)
        stood |= {name: clock.taken.get(name, 0) + own for name, own in zip(then, turns, strict=True)}
    left_out = {name: name for name in stood if name not in former.values() and name not in former}
    known = former | left_out
    taken = {name: math.ceil(stood.get(was, 0) * samples) if was else 0 for name, was in known.items()}
    orders = {name: order_of(clock, was, len(then) == 1) for name, was in known.items() if was}
    if not same:
        places = [f"{name} goes on behind {taken[name]:,}" if taken[name] else f"{name} begins" for name in former]
        say(f"data.train is mixed anew from sample {clock.samples:,} of the run on: {', '.join(places)}")
    return replace(
        clock,
        mixed=clock.mixed if same and samples == 1 else clock.samples,
        taken=taken,
        orders={name: order for name, order in orders.items() if order != name},
    )


def order_of(clock: Clock, name: str, alone: bool) -> str:
    """What the order of a source is drawn by, beside the seed; "" of one that the run began with `alone`."""
    return clock.orders.get(name, "" if alone and not clock.taken else name)


def _config(manifest: dict[str, Any]) -> DataConfig:
    """The sources that the checkpoint was trained on."""
    return DataConfig(train=manifest["config"]["data"]["train"])


def _former(
    sources: Sequence[PreparedSource], clock: Clock, then: list[str], texts: dict[str, str]
) -> dict[str, str | None]:
    """By the name of a source the one that it had in the checkpoint: that of the same text, else its own, where it was
    left out lately too; None if it is new."""
    found = {each.name: each.name for each in sources if each.name in then and _is_text(each, texts.get(each.name))}
    for each in sources:
        twins = (name for name in then if name not in found.values() and name in texts and _is_text(each, texts[name]))
        if each.name not in found and (twin := next(twins, None)) is not None:
            found[each.name] = twin
    own = {each.name: each.name for each in sources if each.name in {*then, *clock.taken} - {*found.values()}}
    return {each.name: found.get(each.name, own.get(each.name)) for each in sources}


def _is_text(source: PreparedSource, text: str | None) -> bool:
    """Whether a checkpoint's word for a text, None in an old one, means that of `source`."""
    return text is None or text in source.known_as


def _warn(run: Run, sources: Sequence[PreparedSource], former: dict[str, str | None], manifest: dict[str, Any]) -> None:
    texts = manifest.get("text") or {}
    for each in sources:
        if (was := former[each.name]) is not None and not _is_text(each, texts.get(was)):
            say(
                f"warning: the training text of {each.name} is not what the checkpoint was trained on; samples are now "
                "of the new"
            )
    seed = manifest["config"]["seed"]
    if seed != run.seed:
        say(f"warning: seed was {seed}, is {run.seed}: samples come in another order, so some of this epoch come again")


def _samples_for_one(run: Run, manifest: dict[str, Any]) -> Fraction:
    """How many of today's samples hold the text of one of the checkpoint's; 1 where samples are not cut to a length."""
    then, now = manifest["config"]["data"]["sequence_length"], run.data.sequence_length
    if then == now or not run.task.cuts_rows:
        return Fraction(1)
    say(
        f"warning: data.sequence_length was {then}, is {now}: rows are cut anew. Each source goes on after as many "
        "tokens as before, but some text of this epoch may come again"
    )
    return Fraction(then, now)
