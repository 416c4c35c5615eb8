"""Runs on a real Slurm of four nodes, submitted by launch/submit.py: `pytest tests/launching/test_slurm.py --long`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import ROOT, environment, python, small, train_rows
from slurm_cluster import Cluster, cluster, missing, until

REASON = missing()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SECONDS = 60  # that the steps of an interrupted run take, on whatever machine this is


@dataclass(frozen=True)
class Site:
    """A cluster, the arguments of a small run on text of its own, and how long such a run takes here."""

    slurm: Cluster
    folder: Path
    arguments: list[str]

    def run(self, name: str) -> Path:
        return self.folder / name

    def of(self, name: str, *more: str) -> list[str]:
        """train.py's words for the run `name`."""
        return [*self.arguments, f"run.dir={self.run(name)}", f"run.name={name}", *more]

    def submit(self, name: str, *more: str) -> str:
        """The number of the job that trains the run `name` on two nodes."""
        words = ["launch/submit.py", "launch=slurm", "launch.nodes=2", "launch.rendezvous_timeout=60"]
        done = python(*words, *self.of(name, *more), **self.slurm.environment)
        assert done.returncode == 0, done.stderr
        match = re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)
        assert match is not None
        return match[1]

    def output(self, name: str) -> str:
        """What the job of the run `name` printed."""
        return "".join(path.read_text() for path in (self.run(name) / "logs").glob("slurm-*.out"))

    def state(self, name: str) -> str:
        return (self.run(name) / "state").read_text().strip()

    def steps(self, name: str) -> int:
        """How many rows of steps the run `name` has written."""
        return len(train_rows(self.run(name))) if (self.run(name) / "metrics.jsonl").exists() else 0

    def wait_for_steps(self, name: str, steps: int) -> None:
        until(lambda: self.steps(name) >= steps, 300, lambda: self.output(name))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "cluster") as slurm:
        # attention dropout is drawn anew in another layout
        yield Site(slurm, folder, [*small(folder), "model.attention_dropout=0"])


@dataclass(frozen=True)
class Straight:
    """A run that nothing interrupted: its steps, its losses, and the seconds before its first step."""

    steps: int
    losses: list[float]
    start: float

    @property
    def words(self) -> list[str]:
        return [f"steps={self.steps}", f"checkpoint.every={self.steps // 10}"]


@pytest.fixture(scope="module")
def straight(site: Site) -> Straight:
    """On two nodes, of as many steps as take about `SECONDS` here; the first run says how many these are."""
    job = site.submit("trial", "steps=300")
    began = time.monotonic()
    site.wait_for_steps("trial", 1)
    start = time.monotonic() - began
    site.slurm.wait(job, "COMPLETED")
    rates = sorted(row["tokens_per_second"] / 64 for row in train_rows(site.run("trial")))
    steps = int(rates[len(rates) // 2] * SECONDS) // 10 * 10
    job = site.submit("straight", f"steps={steps}")
    site.slurm.wait(job, "COMPLETED")
    return Straight(steps, losses_of(site.run("straight")), start)


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in train_rows(run)]


def test_a_job_trains_over_two_nodes(site: Site) -> None:
    """As one process does without Slurm."""
    job = site.submit("two-nodes", 'launch.options=["--comment=it\'s a run"]')
    assert site.slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", site.output("two-nodes")
    alone = python("train.py", *site.of("alone"))
    assert alone.returncode == 0, alone.stderr
    assert losses_of(site.run("two-nodes")) == pytest.approx(losses_of(site.run("alone")), rel=1e-5)
    assert "node1" in site.output("two-nodes")
    assert "node2" in site.output("two-nodes")
    assert site.state("two-nodes") == "done"
    assert site.slurm.field(job, "Comment") == "it's"  # whose words we split; Slurm has them all
    assert {path.name for path in (site.run("two-nodes") / "logs").iterdir()} == {
        "rank-00000.log", "rank-00001.log", f"slurm-{job}.out",
    }  # fmt: skip


def test_a_time_limit_saves_requeues_and_resumes(site: Site, straight: Straight) -> None:
    """Two minutes, and the run is told within half a minute around the middle of its steps: Slurm looks that often."""
    told = straight.start + SECONDS / 2 + 15
    job = site.submit("limited", *straight.words, "launch.time=2", f"launch.warning={120 - int(told)}")
    until(lambda: site.slurm.field(job, "Restarts") == "1", 180, lambda: site.output("limited"))
    site.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # a busy machine may not begin in two minutes
    first = site.steps("limited")
    assert 0 < first < straight.steps
    assert site.slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", timeout=400) == "COMPLETED", site.output("limited")
    assert f"continuing at step {first}:" in site.output("limited")
    assert losses_of(site.run("limited")) == straight.losses
    assert site.state("limited") == "done"


def test_scancel_ends_cleanly(site: Site) -> None:
    job = site.submit("cancelled", "steps=100000", "checkpoint.every=50")
    site.wait_for_steps("cancelled", 60)
    site.slurm("scancel", job)
    assert site.slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING", timeout=60) == "CANCELLED"
    until(lambda: not site.slurm.processes(f"SLURM_JOB_ID={job}"), 30, lambda: site.output("cancelled"))
    assert site.slurm.field(job, "Restarts") == "0"
    assert site.state("cancelled") == "stopped"
    newest = site.run("cancelled") / "checkpoints" / f"step-{site.steps('cancelled')}"
    done = python("scripts/checkpoint.py", "verify", str(newest))
    assert done.returncode == 0, done.stdout + done.stderr


def test_scancel_s_signal_requeues(site: Site) -> None:
    """As preemption does, and whoever wants the node for a while."""
    job = site.submit("signalled", "steps=100000")
    site.wait_for_steps("signalled", 10)
    site.slurm("scancel", "--signal=USR1", job)
    until(lambda: site.slurm.field(job, "Restarts") == "1", 60, lambda: site.output("signalled"))
    site.slurm("scancel", job)
    assert site.slurm.wait(job, "CANCELLED", timeout=60) == "CANCELLED"


@pytest.mark.parametrize("victim", ["node2", "node1"])
def test_a_killed_node_is_survived(site: Site, straight: Straight, victim: str) -> None:
    """`node1` is also where the batch script runs and torchrun's agents meet."""
    name = f"lost-{victim}"
    job = site.submit(name, *straight.words)
    site.wait_for_steps(name, straight.steps // 4)
    assert victim in site.slurm("scontrol", "show", "hostnames", site.slurm.field(job, "NodeList"))
    site.slurm.kill_node(victim)
    try:
        until(lambda: site.slurm.field(job, "Restarts") == "1", 60, lambda: site.output(name))
        assert site.slurm.wait(job, "COMPLETED", "FAILED", timeout=300) == "COMPLETED", site.output(name)
        assert victim not in site.slurm("scontrol", "show", "hostnames", site.slurm.field(job, "NodeList"))
    finally:
        site.slurm.start_node(victim)
    losses = {row["step"]: row["loss"] for row in train_rows(site.run(name))}
    assert list(losses.values()) == straight.losses
    assert "continuing at step" in site.output(name)


def test_a_crash_is_not_requeued(site: Site) -> None:
    job = site.submit("crashed", "launch.restarts=0", "steps=100000")
    site.wait_for_steps("crashed", 10)
    trainers = [pid for pid in site.slurm.processes(f"SLURM_JOB_ID={job}") if "train.py" in command_of(pid)]
    subprocess.run(["kill", "-KILL", *map(str, trainers)], check=True)
    assert site.slurm.wait(job, "FAILED", "COMPLETED", "PENDING", timeout=120) == "FAILED"
    assert site.state("crashed") == "running"


def command_of(pid: int) -> str:
    """A process's own words, where it is Python and not one of its launchers."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[2] if len(words) > 2 and words[1] == "-u" else ""


def test_srun_starts_train_py_without_torchrun(site: Site) -> None:
    """Its ranks meet at the first node's name, which here is no host's."""
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, str(ROOT / "train.py")]
    variables = environment(**site.slurm.environment, MASTER_ADDR="127.0.0.1")
    done = subprocess.run(
        [*words, *site.of("srun")], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data(2) × tensor(1)" in done.stdout
    assert len(losses_of(site.run("srun"))) == 5


def test_a_sweep_is_an_array_of_jobs(site: Site) -> None:
    words = [
        "train.py", "--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5",
        f"hydra.launcher.submitit_folder={site.folder}/submitit", *site.of("sweep"), "optimizer.lr=1e-3,2e-3",
    ]  # fmt: skip
    done = python(*words, timeout=200, **site.slurm.environment)
    assert done.returncode == 0, done.stderr
    runs = {path.parent.name: losses_of(path.parent) for path in site.run("sweep").glob("*/metrics.jsonl")}
    assert set(runs) == {"optimizer.lr=0.001", "optimizer.lr=0.002"}
    assert all(len(losses) == 5 for losses in runs.values())
    assert runs["optimizer.lr=0.001"] != runs["optimizer.lr=0.002"]
    tasks = [path.name for path in (site.folder / "submitit").glob("*_log.out")]
    assert sorted(name.partition("_")[2] for name in tasks) == ["0_0_log.out", "1_0_log.out"]  # of one array
