"""Runs on a real Slurm of four nodes, submitted by launch/submit.py: `pytest tests/launching/test_slurm.py --long`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import ROOT, environment, launch, python, small, train_rows
from slurm_cluster import Cluster, cluster, missing, until

REASON = missing()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
ENDLESS = "steps=100000"  # no machine makes them before what is to happen
TIMEOUT = 900  # seconds: a wait costs them only where it fails


@dataclass(frozen=True)
class Site:
    """A cluster, and the arguments of a small run on text of its own."""

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
        words = ["launch/submit.py", "launch=slurm", "launch.nodes=2"]
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
        until(lambda: self.steps(name) >= steps, TIMEOUT, lambda: self.output(name))

    def wait_for_restart(self, name: str, job: str) -> None:
        """Until Slurm has put the job back into the queue, and all of its processes have ended."""
        until(lambda: self.slurm.field(job, "Restarts") == "1", TIMEOUT, lambda: self.output(name))
        self.wait_for_no_process(name, job)

    def wait_for_no_process(self, name: str, job: str) -> None:
        until(lambda: not self.slurm.processes(f"SLURM_JOB_ID={job}"), TIMEOUT, lambda: self.output(name))

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """Start no job, and none anew, while the context lasts."""
        self.slurm("scontrol", "update", "PartitionName=batch", "State=DOWN")
        try:
            yield
        finally:
            self.slurm("scontrol", "update", "PartitionName=batch", "State=UP")

    def cancel(self, name: str, job: str) -> None:
        self.slurm("scancel", job)
        assert self.slurm.wait(job, "CANCELLED", timeout=TIMEOUT) == "CANCELLED"
        self.wait_for_no_process(name, job)

    def check_saved(self, name: str) -> None:
        """The run's state, and the checkpoint of its last step."""
        assert self.state(name) == "stopped"
        checkpoint = self.run(name) / "checkpoints" / f"step-{self.steps(name)}"
        done = python("scripts/checkpoint.py", "verify", str(checkpoint))
        assert done.returncode == 0, done.stdout + done.stderr

    def check_losses(self, name: str, more: int = 0) -> None:
        """As those of a run that nothing ended, `more` steps after the last one included, which are made here."""
        steps = len({row["step"] for row in train_rows(self.run(name))}) + more
        for each in ([name] if more else []) + [f"{name}-straight"]:
            done = launch(2, "train.py", *self.of(each, ENDLESS, f"stop_at={steps}"), timeout=TIMEOUT)
            assert done.returncode == 0, done.stderr
        losses = {row["step"]: row["loss"] for row in train_rows(self.run(name))}
        assert list(losses.values()) == losses_of(self.run(f"{name}-straight"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "cluster") as slurm:
        # attention dropout is drawn anew in another layout
        yield Site(slurm, folder, [*small(folder), "model.attention_dropout=0"])


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


def test_a_time_limit_saves_requeues_and_resumes(site: Site) -> None:
    """The limit is set once the run trains: two minutes from then, which is when Slurm warns."""
    job = site.submit("limited", ENDLESS, "launch.time=600", "launch.warning=120")
    site.wait_for_steps("limited", 10)
    hours, minutes, _ = map(int, site.slurm.field(job, "RunTime").split(":"))
    site.slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + minutes + 3}")
    with site.holding_back():
        site.wait_for_restart("limited", job)
        site.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=600")
        site.check_saved("limited")
        first = site.steps("limited")
    site.wait_for_steps("limited", first + 10)
    assert f"continuing at step {first}:" in site.output("limited")
    site.cancel("limited", job)
    site.check_losses("limited")


def test_scancel_ends_cleanly(site: Site) -> None:
    job = site.submit("cancelled", ENDLESS, "checkpoint.every=50")
    site.wait_for_steps("cancelled", 60)
    site.cancel("cancelled", job)
    assert site.slurm.field(job, "Restarts") == "0"
    site.check_saved("cancelled")
    site.check_losses("cancelled", more=5)


@pytest.mark.parametrize("whom", ["steps", "full"])
@pytest.mark.parametrize("name", ["USR1", "TERM", "INT", "HUP", "QUIT"])
def test_scancel_s_signal_requeues(site: Site, name: str, whom: str) -> None:
    """As preemption does, and whoever wants the node for a while. `full`: the batch script and srun get it, too."""
    run = f"{name}-{whom}"
    job = site.submit(run, ENDLESS)
    site.wait_for_steps(run, 10)
    with site.holding_back():
        site.slurm("scancel", f"--signal={name}", *(["--full"] if whom == "full" else []), job)
        site.wait_for_restart(run, job)
        site.cancel(run, job)
    site.check_saved(run)
    site.check_losses(run, more=5)


@pytest.mark.parametrize("name", ["USR1", "TERM", "INT", "HUP", "QUIT"])
def test_a_signal_to_the_batch_script_alone_is_none(site: Site, name: str) -> None:
    run = f"{name}-batch"
    job = site.submit(run, ENDLESS)
    site.wait_for_steps(run, 10)
    site.slurm("scancel", f"--signal={name}", "--batch", job)
    site.wait_for_steps(run, site.steps(run) + 50)
    assert (site.slurm.field(job, "JobState"), site.slurm.field(job, "Restarts")) == ("RUNNING", "0")
    site.cancel(run, job)
    site.check_saved(run)


@pytest.mark.parametrize("victim", ["node2", "node1"])
def test_a_killed_node_is_survived(site: Site, victim: str) -> None:
    """`node1` is also where the batch script runs and torchrun's agents meet."""
    name = f"lost-{victim}"
    job = site.submit(name, ENDLESS, "checkpoint.every=50")
    site.wait_for_steps(name, 120)
    assert victim in site.slurm("scontrol", "show", "hostnames", site.slurm.field(job, "NodeList"))
    site.slurm.kill_node(victim)
    try:
        until(lambda: site.slurm.field(job, "Restarts") == "1", TIMEOUT, lambda: site.output(name))
        until(lambda: "continuing at step" in site.output(name), TIMEOUT, lambda: site.output(name))
        site.wait_for_steps(name, site.steps(name) + 60)
        assert victim not in site.slurm("scontrol", "show", "hostnames", site.slurm.field(job, "NodeList"))
        site.cancel(name, job)
    finally:
        site.slurm.start_node(victim)
    site.check_losses(name)


def test_a_crash_is_not_requeued(site: Site) -> None:
    job = site.submit("crashed", "launch.restarts=0", ENDLESS)
    site.wait_for_steps("crashed", 10)
    trainers = [pid for pid in site.slurm.processes(f"SLURM_JOB_ID={job}") if "opt_parallel" in command_of(pid)]
    subprocess.run(["kill", "-KILL", *map(str, trainers)], check=True)
    assert site.slurm.wait(job, "FAILED", "COMPLETED", "PENDING", timeout=TIMEOUT) == "FAILED"
    assert site.state("crashed") == "running"


def command_of(pid: int) -> str:
    """A process's own words, where it is Python and not one of its launchers."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return " ".join(words[2:]) if words[1:2] == ["-u"] else ""


def test_srun_starts_train_py_without_torchrun(site: Site) -> None:
    """Its ranks meet at the first node's name, which here is no host's."""
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, str(ROOT / "train.py")]
    variables = environment(**site.slurm.environment, MASTER_ADDR="127.0.0.1")
    done = subprocess.run(
        [*words, *site.of("srun")], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data(2) × tensor(1)" in done.stdout
    assert len(losses_of(site.run("srun"))) == 5


def test_a_sweep_is_an_array_of_jobs(site: Site) -> None:
    words = [
        "train.py", "--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=60",
        f"hydra.launcher.submitit_folder={site.folder}/submitit", *site.of("sweep"), "optimizer.lr=1e-3,2e-3",
    ]  # fmt: skip
    done = python(*words, timeout=TIMEOUT, **site.slurm.environment)
    assert done.returncode == 0, done.stderr
    runs = {path.parent.name: losses_of(path.parent) for path in site.run("sweep").glob("*/metrics.jsonl")}
    assert set(runs) == {"optimizer.lr=0.001", "optimizer.lr=0.002"}
    assert all(len(losses) == 5 for losses in runs.values())
    assert runs["optimizer.lr=0.001"] != runs["optimizer.lr=0.002"]
    tasks = [path.name for path in (site.folder / "submitit").glob("*_log.out")]
    assert sorted(name.partition("_")[2] for name in tasks) == ["0_0_log.out", "1_0_log.out"]  # of one array
