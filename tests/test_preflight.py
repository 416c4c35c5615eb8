"""What ranks that do not fit together are told, each by host and rank; the crew's processes, and some as a user starts
them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, environment, small, write_text

from opt_parallel.config.data import DataConfig
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import CheckpointConfig
from opt_parallel.config.run import OptimizerConfig, ParallelConfig, Run, RunConfig
from opt_parallel.runtime.errors import UserError

TINY = ModelConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=256)


def run_in(folder: Path, **fields: Any) -> Run:
    write_text(folder)
    data = DataConfig(train="text.jsonl", cache=str(folder / "cache"), sequence_length=16)
    return Run(**{"model": TINY, "data": data, "run": RunConfig(dir=str(folder / "run")), **fields})


def said(runs: list[Run], hosts: list[str], folders: list[Path]) -> tuple[bool, str, float]:
    """On the crew: each rank with its own settings, host and folder; whether all were refused, with which words,
    and after how many seconds."""
    rank = int(os.environ["RANK"])
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.preflight import check_same, make_run_folder, preflight

    before, began = Path.cwd(), time.monotonic()
    os.environ["SLURMD_NODENAME"] = hosts[rank]
    os.chdir(folders[rank])
    run = runs[rank]
    try:
        with Topology.open(run.parallel.tensor, run.parallel.allow_cross_node) as topology:
            check_same(run, topology)
            topology.together(lambda: make_run_folder(run.folder))
            return False, "\n".join(preflight(run, topology)), time.monotonic() - began
    except UserError as error:
        return error.shared, str(error), time.monotonic() - began
    finally:
        os.chdir(before)
        del os.environ["SLURMD_NODENAME"]


def refusal(crew: Any, runs: list[Run], folders: list[Path], hosts: tuple[str, ...] = ("nodeA", "nodeB")) -> str:
    """The line that all ranks end with, soon."""
    answers = crew(len(runs))(said, runs, list(hosts), folders)
    assert all(refused and seconds < 30 for refused, _, seconds in answers), answers
    lines = {line for _, line, _ in answers}
    assert len(lines) == 1, lines
    (line,) = lines
    assert "\n" not in line
    return line


def test_what_is_said_when_all_is_well(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path, parallel=ParallelConfig(tensor=2), checkpoint=CheckpointConfig(every=10), steps=100)
    answers = crew(4)(said, [run] * 4, ["nodeA", "nodeA", "nodeB", "nodeB"], [tmp_path] * 4)
    assert not any(refused for refused, _, _ in answers)
    summary, *grid = answers[0][1].split("\n")
    for words in (
        "4 ranks, 2 hosts",
        "CPU multiplies correctly",
        "tensor ",
        "data ",
        " GB/s",
        "3 checkpoints of 3.17 MB",
        "clocks",
    ):
        assert words in summary
    assert grid == ["  nodeA  ranks 0–1  data 0  tensor 0–1", "  nodeB  ranks 2–3  data 1  tensor 0–1"]
    assert not list((tmp_path / "run").glob(".preflight*"))


def test_other_settings(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    other = dataclasses.replace(run, optimizer=OptimizerConfig(lr=0.5))
    line = refusal(crew, [run, other], [tmp_path] * 2)
    assert line.startswith("nodeB, rank 1 has other settings than nodeA, rank 0, optimizer.lr 0.5 instead of 0.0006: ")


def test_another_tensor_degree(crew: Any, tmp_path: Path) -> None:
    """Before any group is made by it."""
    run = run_in(tmp_path)
    line = refusal(crew, [run, dataclasses.replace(run, parallel=ParallelConfig(tensor=2))], [tmp_path] * 2)
    assert line.startswith("nodeB, rank 1 was started with tensor degree 2, nodeA, rank 0 with 1: ")


def with_version(package: str, number: str, folder: Path, *arguments: Any) -> Any:
    """On the crew: `said`, while rank 1 finds another version of `package` installed."""
    if int(os.environ["RANK"]) != 1:
        return said(*arguments)
    installed = folder / "site" / f"{package}-{number}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    sys.path.insert(0, str(installed.parent))
    try:
        return said(*arguments)
    finally:
        sys.path.remove(str(installed.parent))


def test_another_version_of_a_library(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    answers = crew(2)(
        with_version, "tokenizers", "9.9.9", tmp_path, [run, run], ["nodeA", "nodeB"], [tmp_path, tmp_path]
    )
    assert {refused for refused, _, _ in answers} == {True}
    assert answers[0][1] == answers[1][1]
    assert answers[0][1].startswith(
        "nodeB, rank 1 has other libraries than nodeA, rank 0, tokenizers 9.9.9 instead of "
    )


def with_code(checksum: str, *arguments: Any) -> Any:
    from opt_parallel import preflight

    before = preflight.code_checksum
    if int(os.environ["RANK"]) == 1:
        preflight.code_checksum = lambda: checksum
    try:
        return said(*arguments)
    finally:
        preflight.code_checksum = before


def test_other_code(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    answers = crew(2)(with_code, "0123456789ab", [run, run], ["nodeA", "nodeB"], [tmp_path, tmp_path])
    assert "nodeB, rank 1 has other code than nodeA, rank 0, opt-parallel 0123456789ab instead of" in answers[0][1]


def test_code_checksum_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opt_parallel import preflight

    before, package = preflight.code_checksum(), tmp_path / "opt_parallel"
    shutil.copytree(ROOT / "opt_parallel", package)
    monkeypatch.setattr(preflight, "__file__", str(package / "preflight.py"))
    assert preflight.code_checksum() == before
    with (package / "optim.py").open("a") as file:
        file.write("# another\n")
    assert preflight.code_checksum() != before


def test_text_that_one_host_lacks_or_has_otherwise(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    line = refusal(crew, [run, run], [tmp_path, elsewhere])
    assert line == "nodeB, rank 1: data.train=text.jsonl: no such file or folder; check the path"
    changed = (tmp_path / "text.jsonl").read_text().replace("Sentence 3 ", "Sentence 8 ")
    (elsewhere / "text.jsonl").write_text(changed)
    line = refusal(crew, [run, run], [tmp_path, elsewhere])
    assert line.startswith("nodeB, rank 1 has another text.jsonl than nodeA, rank 0: copy the same text to every host")


def test_the_same_text_at_other_places(crew: Any, tmp_path: Path) -> None:
    """A copy on each host is as good as a shared folder."""
    run, elsewhere = run_in(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_text(elsewhere)
    answers = crew(2)(said, [run, run], ["nodeA", "nodeB"], [tmp_path, elsewhere])
    assert [refused for refused, _, _ in answers] == [False, False], answers


def test_a_run_folder_that_is_not_shared(crew: Any, tmp_path: Path) -> None:
    run = dataclasses.replace(run_in(tmp_path), run=RunConfig(dir="run"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_text(elsewhere)
    line = refusal(crew, [run, run], [tmp_path, elsewhere])
    assert line.startswith("nodeB, rank 1: run.dir=run is not the folder that nodeA, rank 0 writes to: ")


def test_too_little_disk(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path, checkpoint=CheckpointConfig(every=10), steps=100)
    disk = tmp_path / "run"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", disk], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        line = refusal(crew, [run, run], [tmp_path] * 2)
        assert f"run.dir={disk} has 8.39 MB free, but 3 checkpoints of 3.17 MB" in line
        assert "(checkpoint.keep=2, and the one being written): free space" in line
        assert not refused_with(crew, dataclasses.replace(run, checkpoint=CheckpointConfig(every=10, keep=1)), tmp_path)
    finally:
        subprocess.run(["umount", disk], check=True)


def refused_with(crew: Any, run: Run, folder: Path) -> bool:
    return any(refused for refused, _, _ in crew(2)(said, [run, run], ["nodeA", "nodeB"], [folder, folder]))


def test_a_tensor_group_across_hosts(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path, parallel=ParallelConfig(tensor=2))
    line = refusal(crew, [run] * 4, [tmp_path] * 4, ("nodeA", "nodeB", "nodeB", "nodeA"))
    assert line.startswith(
        "parallel.tensor=2: a tensor group spans several hosts (rank 0 on nodeA, rank 1 on nodeB), and every layer "
    )
    allowed = dataclasses.replace(run, parallel=ParallelConfig(tensor=2, allow_cross_node=True))
    answers = crew(4)(said, [allowed] * 4, ["nodeA", "nodeB", "nodeB", "nodeA"], [tmp_path] * 4)
    assert not any(refused for refused, _, _ in answers), answers
    assert answers[0][1].split("\n")[1:] == [
        "  nodeA  ranks 0, 3  data 0–1  tensor 0–1",
        "  nodeB  ranks 1–2   data 0–1  tensor 0–1",
    ]


def sick(fault: str) -> str:
    """On the crew: what the check of a device says where a product is wrong, or raises."""
    import torch

    from opt_parallel import preflight

    class Sick(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            result = super().__torch_function__(function, types, arguments, named or {})
            if function is torch.Tensor.matmul and result.dtype is torch.float32:
                if fault == "raises":
                    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might …")
                result[3, 5] += 1
            return result

    before = torch.arange
    torch.arange = lambda *sizes: before(*sizes).as_subclass(Sick)
    try:
        preflight._check_device(torch.device("cpu"))
    except UserError as error:
        return str(error)
    finally:
        torch.arange = before
    return ""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("adds", "the CPU returned a wrong product: take it out of service"),
        ("raises", "the CPU does not work (CUDA error: uncorrectable ECC error encountered): take it out of service"),
    ],
)
def test_a_sick_device(fault: str, line: str) -> None:
    assert sick(fault) == line


def with_a_device_that_hangs(sick: int, *arguments: Any) -> tuple[bool, str, float]:
    """On the crew: `said`, while the device of one rank takes longer than is waited for."""
    from opt_parallel import preflight

    def hang(_: Any) -> None:
        time.sleep(5)
        raise TimeoutError  # a rank that came back would wait for the others

    timeout, check = preflight.DEVICE_TIMEOUT, preflight._check_device
    preflight.DEVICE_TIMEOUT = timedelta(seconds=1)
    if int(os.environ["RANK"]) == sick:
        preflight._check_device = hang
    try:
        return said(*arguments)
    except TimeoutError:
        return False, "", 0.0
    finally:
        preflight.DEVICE_TIMEOUT, preflight._check_device = timeout, check


@pytest.mark.parametrize("sick", [0, 1])
def test_a_device_that_hangs_is_named(crew: Any, tmp_path: Path, sick: int) -> None:
    run = run_in(tmp_path)
    answers = crew(2)(with_a_device_that_hangs, sick, [run, run], ["nodeA", "nodeB"], [tmp_path, tmp_path])
    shared, line, seconds = answers[1 - sick]
    assert line.startswith(f"node{'AB'[sick]}, rank {sick} did not answer within 1 s: its device or its host hangs")
    assert shared == (sick == 1)  # rank 0 says it, where it can
    assert seconds < 4.5  # it did not wait for the other


@pytest.mark.long
@pytest.mark.parametrize("wrong", ["settings", "text"])
def test_started_by_torchrun_all_end_with_one_line(tmp_path: Path, wrong: str) -> None:
    """Rank 1 has another command line, or stands where the text is not: no rank hangs, and rank 0 alone speaks."""
    arguments = small(tmp_path)
    where, also = f"cd {ROOT}", ""
    if wrong == "settings":
        also = "optimizer.lr=0.5"
    else:
        arguments.append("data.train=text.jsonl")
        where = f"cd {tmp_path}; [ $RANK = 1 ] && cd /"
    script = (
        f"export SLURMD_NODENAME=node$RANK PYTHONPATH={ROOT}; {where}; "
        f'exec {sys.executable} {ROOT}/train.py "$@" $([ $RANK = 1 ] && echo {also})'
    )
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
         "bash", "-c", script, "train", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert errors[0].startswith("error: node1, rank 1")
    assert ("optimizer.lr 0.5" if wrong == "settings" else "data.train=text.jsonl: no such file") in errors[0]
    assert "opt_parallel/" not in process.stderr, "a rank printed a traceback"
    assert process.stderr.count("exitcode  : 2") == process.stderr.count("exitcode  :") == 2


def with_a_clock(ahead: float, *arguments: Any) -> tuple[bool, str, float, str]:
    """On the crew: `said`, while rank 1's clock is ahead; and what was printed."""
    import contextlib
    import io

    before, printed = time.time, io.StringIO()
    if int(os.environ["RANK"]) == 1:
        time.time = lambda: before() + ahead
    try:
        with contextlib.redirect_stdout(printed):
            return (*said(*arguments), printed.getvalue())
    finally:
        time.time = before


def test_a_clock_that_is_wrong(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    arguments = ([run, run], ["nodeA", "nodeB"], [tmp_path, tmp_path])
    (refused, summary, _, printed), _ = crew(2)(with_a_clock, 100.0, *arguments)
    assert not refused
    assert "warning: the clock of nodeB, rank 1 is 100 s ahead of that of nodeA, rank 0: " in printed
    assert "clocks within 100.0 s" in summary
    (_, _, _, printed), _ = crew(2)(with_a_clock, 0.0, *arguments)
    assert "clock" not in printed
