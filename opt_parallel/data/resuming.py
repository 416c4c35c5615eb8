"""Resumes the training data after a change of sources, weights, sequence length or seed.

Each source of training text resumes after the samples that were used, and its samples keep their order. The position of
a source is one number, which does not depend on other sources. The mixture with the new weights starts at the sample of
the run at which the weights were changed. docs/resuming.md describes the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from opt_parallel.config.data import DataConfig
from opt_parallel.config.run import Run
from opt_parallel.config.task import TaskConfig
from opt_parallel.data.prepare import PreparedSource
from opt_parallel.data.samples.mixture import Cycle, turns_of
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.log import say


def resumed_clock(run: Run, sources: Sequence[PreparedSource], manifest: dict[str, Any]) -> Clock:
    """The position in the data at which `run`, with its present `sources`, resumes from the checkpoint of `manifest`.

    The function prints which sources changed, and warns if the data cannot resume exactly."""
    clock = Clock.saved(manifest["clock"])
    then = {each.name: Fraction(each.weight) for each in _config(manifest).train_sources}
    former = _former(sources, clock, list(then), manifest.get("text") or {})
    _warn(run.seed, sources, former, manifest)
    samples = _samples_per_saved_sample(run.task, run.data.sequence_length, manifest)
    weights = [source.weight for source in sources]
    same = [*former.values()] == [*then] and turns_of([*then.values()]) == turns_of(weights)
    if same and samples == 1 and [*former] == [*then]:
        return clock
    used = dict(clock.taken)  # number of used samples of all sources, including removed sources
    if not same or samples != 1:
        turns = Cycle(tuple(then.values())).taken(clock.samples - clock.mixed)
        used |= {name: clock.taken.get(name, 0) + own for name, own in zip(then, turns, strict=True)}
    left_out = {name: name for name in used if name not in former.values() and name not in former}
    known = former | left_out
    taken = {name: math.ceil(used.get(was, 0) * samples) if was else 0 for name, was in known.items()}
    orders = {name: order_of(clock, was, len(then) == 1) for name, was in known.items() if was}
    if not same:
        starts = [
            f"{name} after {taken[name]:,} samples" if taken[name] else f"{name} from its start" for name in former
        ]
        say(f"data.train changed: the new mixture starts at sample {clock.samples:,} of the run: {', '.join(starts)}")
    return replace(
        clock,
        mixed=clock.mixed if same and samples == 1 else clock.samples,
        taken=taken,
        orders={name: order for name, order in orders.items() if order != name},
    )


def order_of(clock: Clock, name: str, alone: bool) -> str:
    """The text that, together with the run's seed, seeds the order of a source's samples.

    The text is empty for a source that was the only source when the run started (`alone`)."""
    return clock.orders.get(name, "" if alone and not clock.taken else name)


def _config(manifest: dict[str, Any]) -> DataConfig:
    """The `data` section of the checkpoint's configuration, with its training sources."""
    return DataConfig(train=manifest["config"]["data"]["train"])


def _former(
    sources: Sequence[PreparedSource], clock: Clock, then: list[str], texts: dict[str, str]
) -> dict[str, str | None]:
    """The name of each source in the checkpoint, or None for a new source.

    A source with the same text in the checkpoint determines the name. If there is none, a source with the same name
    does, even if the checkpoint's last mixture did not contain this source."""
    found = {each.name: each.name for each in sources if each.name in then and _is_text(each, texts.get(each.name))}
    for each in sources:
        twins = (name for name in then if name not in found.values() and name in texts and _is_text(each, texts[name]))
        if each.name not in found and (twin := next(twins, None)) is not None:
            found[each.name] = twin
    own = {each.name: each.name for each in sources if each.name in {*then, *clock.taken} - {*found.values()}}
    return {each.name: found.get(each.name, own.get(each.name)) for each in sources}


def _is_text(source: PreparedSource, text: str | None) -> bool:
    """Whether `text`, an identifier of a text in a checkpoint, identifies the text of `source`.

    Old checkpoints have None in place of the identifier, and None matches every source."""
    return text is None or text in source.known_as


def _warn(
    seed: int, sources: Sequence[PreparedSource], former: dict[str, str | None], manifest: dict[str, Any]
) -> None:
    texts = manifest.get("text") or {}
    for each in sources:
        if (was := former[each.name]) is not None and not _is_text(each, texts.get(was)):
            say(
                f"warning: the training text of {each.name} differs from the checkpoint's (its files, or the settings "
                "that select and encode documents); new samples come from the new text"
            )
    then = manifest["config"]["seed"]
    if seed != then:
        say(
            f"warning: seed={seed}, but the checkpoint has seed={then}: the order of samples changes, so some "
            "samples of this epoch may repeat"
        )


def _samples_per_saved_sample(task: TaskConfig, now: int, manifest: dict[str, Any]) -> Fraction:
    """The checkpoint's sequence length divided by `now`, or 1 if the task does not cut text into such rows."""
    then = manifest["config"]["data"]["sequence_length"]
    if then == now or not task.cuts_rows:
        return Fraction(1)
    say(
        f"warning: data.sequence_length={now}, but the checkpoint has {then}: each source resumes at the same token, "
        "but some text of this epoch may repeat"
    )
    return Fraction(then, now)
