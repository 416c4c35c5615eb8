"""Planned beside measured step times on this machine's CPUs: of four shapes, and of `auto`'s choice and others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opt_parallel.benchmarks.contenders import CONTENDERS
from opt_parallel.benchmarks.cpu import filled, measured_values
from opt_parallel.benchmarks.race import Team, tell
from opt_parallel.benchmarks.runs import composed
from opt_parallel.config.overrides import PLANNED
from opt_parallel.config.run import Run
from opt_parallel.planning.choice import candidates, choose, words
from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.compose import cluster_file
from opt_parallel.planning.plan import Plan, plan_of

# layers, width, words, micro-batch and tokens a row, whose steps take one to two seconds on two cores
SHAPES = ((6, 256, 8192, 8, 256), (4, 512, 16384, 4, 256), (6, 768, 50272, 1, 256), (2, 1024, 8192, 1, 512))
OTHERS = 5  # settings to compare auto's choice with
SHAPES_HEAD = ["shape", "planned (range), ms", "measured (range), ms", "planned ÷ measured (range)"]
AUTO_HEAD = ["settings", "planned tokens/s", "measured tokens/s (range)", "chosen ÷ this (range)"]


@dataclass
class Timed:
    """Seconds of a step in each round, planned with the rates of that round and measured."""

    name: str
    planned: list[float]
    measured: list[float]

    def row(self) -> list[str]:
        """A row of the table under SHAPES_HEAD. Ratios are of the same round."""
        planned, measured = ([1000 * each for each in times] for times in (self.planned, self.measured))
        return [self.name, spread(planned, 0), spread(measured, 0), spread(ratios(self.planned, self.measured), 2)]


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(first, second, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the smallest and the largest value."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def shape_run(layers: int, width: int, vocabulary: int, micro: int, length: int) -> Run:
    """The run of a shape, with one micro-batch in a step."""
    keys = [f"num_hidden_layers={layers}", f"hidden_size={width}", f"ffn_dim={4 * width}", f"vocab_size={vocabulary}"]
    keys += [f"num_attention_heads={width // 64}", f"max_position_embeddings={length}"]
    model = ["model=opt-125m", *(f"model.{key}" for key in keys)]
    run = composed([*model, "precision=fp32", f"batch.micro={micro}", f"data.sequence_length={length}"])
    return replace(run, batch={"global": micro, "micro": micro})


def cluster_here(processes: int, threads: int) -> Cluster:
    """This machine's CPUs as a cluster of `processes` devices, measured now."""
    return filled(cluster_file("cpu", gpus=processes), measured_values(processes, threads), threads).cluster()


def time_shapes(threads: int, rounds: int, steps: int) -> list[Timed]:
    """Plan and measure steps of the four shapes in one process. The rates of the CPU are measured just before."""
    runs = [shape_run(*shape) for shape in SHAPES]
    teams = _started(runs, 1, threads)
    found = [
        Timed(f"{layers} layers of {width}, {words} words, {micro} × {length} tokens", [], [])
        for layers, width, words, micro, length in SHAPES
    ]
    for turn in range(rounds):
        tell(f"round {turn + 1} of {rounds}")
        for run, team, timed in zip(runs, teams, found, strict=True):
            timed.planned.append(plan_of(run, cluster_here(1, threads)).time.step)
            timed.measured.append(max(team.ask("steps", steps)) / steps)
    for team in teams:
        team.dismiss()
    return found


def settings_to_run(run: Run, cluster: Cluster, others: int) -> list[Plan]:
    """The plan that `auto` chooses, and `others` plans that fit, spread evenly over the order of planned speed."""
    best = choose(run, cluster, PLANNED).best
    plans = [plan_of(each, cluster) for each in candidates(run, cluster, PLANNED)]
    rest = sorted(
        (each for each in plans if each.fits and words(each.run) != words(best.run)), key=lambda each: each.time.step
    )
    count = min(others, len(rest))
    return [best, *(rest[(2 * index + 1) * len(rest) // (2 * count)] for index in range(count))]


def time_auto(run: Run, processes: int, threads: int, rounds: int, steps: int) -> list[list[str]]:
    """Rows of the table under AUTO_HEAD: the chosen settings and OTHERS, measured in turn on `processes`."""
    plans = settings_to_run(run, cluster_here(processes, threads), OTHERS)
    teams = _started([plan.run for plan in plans], processes, threads)
    seconds: list[list[float]] = [[] for _ in plans]
    for turn in range(rounds):
        tell(f"round {turn + 1} of {rounds}")
        for team, times in zip(teams, seconds, strict=True):
            times.append(max(team.ask("steps", steps)) / steps)
    for team in teams:
        team.dismiss()
    rows = []
    for plan, times in zip(plans, seconds, strict=True):
        speeds, tokens = [plan.time.tokens / each for each in times], plan.time.tokens
        beside_chosen = spread(ratios(times, seconds[0]), 2)
        rows.append([words(plan.run), f"{tokens / plan.time.step:,.0f}", spread(speeds, 0), beside_chosen])
    return rows


def _started(runs: Sequence[Run], processes: int, threads: int) -> list[Team]:
    """The processes of all runs, which have done their first steps and wait."""
    teams = []
    for number, run in enumerate(runs, 1):
        tell(f"starting run {number} of {len(runs)}: {words(run)}")
        data = processes // run.parallel.tensor
        share = replace(run, batch={"global": run.global_batch // data, "micro": run.micro_batch})
        teams.append(Team(CONTENDERS["ours"], share, processes, threads))
        teams[-1].answers()
    return teams
