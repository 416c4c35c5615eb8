"""The bad days of a run's checkpoints: damaged files, full and closed disks, pickles from an untrusted hand."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, small, train_rows
from layouts import Layout, run_for
from tampering import edit
from training import trained

from opt_parallel.checkpoint.folders import partial_of
from opt_parallel.checkpoint.inherit import model_at
from opt_parallel.config.model import ModelConfig


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def warnings_of(process: subprocess.CompletedProcess[str]) -> list[str]:
    """What it warned of."""
    return [line for line in process.stdout.splitlines() if line.startswith("warning: ")]


@pytest.fixture(scope="module")
def stopped(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run of two ranks that was saved at steps 1 and 2, and its arguments."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = [*small(folder), "parallel.tensor=2", "zero.stage=1", "steps=9"]
    process = trained(crew(2), *arguments, "checkpoint.every=1", "checkpoint.keep=9", "stop_at=2")
    assert process.returncode == 0, process.stderr
    return folder, arguments


def flip(folder: Path) -> str:
    path = folder / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "rank-00001.safetensors differs from its checksum"


def truncate(folder: Path) -> str:
    os.truncate(folder / "rank-00000.safetensors", 1000)
    return "rank-00000.safetensors has another size than manifest.json states"


def lose(folder: Path) -> str:
    (folder / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors is missing"


def garble(folder: Path) -> str:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])
    return "manifest.json cannot be read ("


def empty(folder: Path) -> str:
    (folder / "manifest.json").write_text("[]")
    return "manifest.json cannot be read ("


def reshape(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"shape": [64]', '"shape": [32]', 1))
    return "manifest.json cannot be read (it differs from its checksum)"


DAMAGES = [flip, truncate, lose, garble, empty, reshape]  # of steps 7, 6, … 2


@pytest.fixture
def damaged(stopped: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str], dict[int, str]]:
    """Checkpoints of steps 1 to 7, all but the oldest damaged; the run's arguments; what is wrong with each step."""
    folder, arguments = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in range(3, 8):
        copy = shutil.copytree(checkpoints / "step-2", checkpoints / f"step-{step}")
        edit(copy, lambda manifest, step=step: manifest["clock"].update(step=step))
    wrong = {7 - n: damage(checkpoints / f"step-{7 - n}") for n, damage in enumerate(DAMAGES)}
    return checkpoints, [*arguments, f"run.dir={tmp_path / 'run'}"], wrong


def find(run_dir: str, resume: str, tokenizer: str, model: ModelConfig) -> tuple[str, str]:
    """On the crew: the name of the checkpoint that is found, or the mistake that looking for one ends with; and what is
    said on the way."""
    import dataclasses

    from opt_parallel.checkpoint.store import Store
    from opt_parallel.config.run import RunConfig
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.errors import UserError

    run = dataclasses.replace(
        run_for(Layout(tensor=2, stage=1)), model=model, run=RunConfig("test", run_dir), resume=resume
    )
    said = io.StringIO()
    with Topology.open(2) as topology, contextlib.redirect_stdout(said):
        store = Store(run, topology, Path(tokenizer))
        try:
            found = store.find()
        except UserError as error:
            return str(error), said.getvalue()
        finally:
            store.finish()
    assert found is not None
    return found.folder.name, said.getvalue()


def test_damaged_ones_are_named_and_the_one_before_is_taken(crew: Any, damaged: Any) -> None:
    checkpoints, _, wrong = damaged
    step = checkpoints / "step-1"
    answers = crew(2)(find, str(checkpoints.parent), "auto", str(step / "tokenizer"), model_at(step, "resume="))
    assert [found for found, _ in answers] == ["step-1"] * 2
    for warning, (step, what) in zip(answers[0][1].splitlines(), wrong.items(), strict=True):
        assert warning.startswith(f"warning: {checkpoints}/step-{step}: {what}")
        assert warning.endswith(f"renamed to step-{step}.damaged")
    assert names_in(checkpoints) == ["step-1", *(f"step-{step}.damaged" for step in range(2, 8))]


def test_a_damaged_one_that_is_asked_for_is_refused(crew: Any, stopped: Any, damaged: Any) -> None:
    checkpoints, arguments, wrong = damaged
    model = model_at(stopped[0] / "run" / "checkpoints" / "step-1", "resume=")
    for step, what in wrong.items():
        chosen = f"{checkpoints}/step-{step}"
        (first, _), (second, _) = crew(2)(find, str(checkpoints.parent), chosen, f"{chosen}/tokenizer", model)
        assert first == second
        assert first.startswith(f"resume={chosen}: {what}")
        assert "choose an earlier checkpoint" in first
    process = trained(crew(1), *arguments, f"resume={checkpoints}/step-7", "parallel.tensor=1")
    assert process.returncode == 2
    assert process.stderr == f"error: resume={checkpoints}/step-7: {wrong[7]}; choose an earlier checkpoint\n"
    assert names_in(checkpoints) == [f"step-{step}" for step in range(1, 8)]  # nothing was touched


def test_without_its_manifest_it_is_renamed(crew: Any, stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    """And does not stand in the way of the one that is saved there now."""
    folder, arguments = stopped
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        shutil.copytree(folder / "run" / "checkpoints" / f"step-{step}", checkpoints / f"step-{step}")
    (checkpoints / "step-2" / "manifest.json").unlink()
    process = trained(crew(1), *arguments, f"run.dir={tmp_path / 'run'}", "parallel.tensor=1", "stop_at=2")
    assert process.returncode == 0, process.stderr
    assert warnings_of(process) == [
        f"warning: {checkpoints}/step-2 has no manifest.json; it is renamed to step-2.damaged"
    ]
    assert names_in(checkpoints) == ["step-1", "step-2", "step-2.damaged"]


def test_none_whole_is_one_line(crew: Any, stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, arguments = stopped
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "run" / "checkpoints" / "step-2", checkpoints / "step-2")
    what = lose(checkpoints / "step-2")
    process = trained(crew(1), *arguments, f"run.dir={tmp_path / 'run'}", "parallel.tensor=1")
    assert process.returncode == 2
    assert warnings_of(process) == [f"warning: {checkpoints}/step-2: {what}; it is renamed to step-2.damaged"]
    assert process.stderr == (
        f"error: {checkpoints} has no complete checkpoint left: choose another run.dir to start again\n"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk(options)`: a file system as a run's folder of checkpoints, of a size in memory or read-only."""
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)

    def mount(options: str) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False).returncode:
            pytest.skip("only root can mount a small disk")
        return disk

    yield mount
    subprocess.run(["umount", disk], check=False)


def test_a_disk_that_is_full_costs_no_older_checkpoint(
    crew: Any, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """Out of files it may hold, not of bytes, which the run would have asked for before it began. Those of one
    checkpoint fit and a second's do not: a warning while the run goes on, and an error at its end."""
    disk = small_disk("nr_inodes=10")
    arguments = [*small(tmp_path), "zero.stage=1", "steps=5", "checkpoint.every=2"]
    process = trained(crew(2), *arguments)
    assert process.returncode != 0
    why = "could not be written (No space left on device)"
    assert warnings_of(process) == [f"warning: {disk}/step-4 {why}; its partial files were deleted"]
    assert [line for line in process.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {disk}/step-5 {why}: free space on this disk and repeat the command; {disk}/step-2 is complete"
    ]
    assert names_in(disk) == ["step-2"]
    assert [row["step"] for row in train_rows(tmp_path / "run")] == [1, 2, 3, 4, 5]
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", disk], check=True)
    again = trained(crew(1), *arguments)
    assert again.returncode == 0, again.stderr
    assert "continuing at step 2:" in again.stdout
    assert names_in(disk) == ["step-4", "step-5"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_read_only_folder(crew: Any, tmp_path: Path, small_disk: Callable[[str], Path], asynchronous: str) -> None:
    disk = small_disk("ro")
    arguments = [*small(tmp_path), "steps=2", "checkpoint.every=1", f"checkpoint.asynchronous={asynchronous}"]
    process = trained(crew(1), *arguments)
    assert process.returncode == 2
    why = "could not be written (Read-only file system)"
    assert warnings_of(process) == [f"warning: {disk}/step-1 {why}; its partial files were deleted"]
    assert process.stderr == (
        f"error: {disk}/step-2 {why}: free space on this disk and repeat the command; there is no earlier checkpoint\n"
    )


def test_a_file_in_the_place_of_the_folder(crew: Any, tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "steps=2"]
    (tmp_path / "run").mkdir()
    in_the_way = tmp_path / "run" / "checkpoints"
    in_the_way.write_text("a file where a folder is to be made")
    process = trained(crew(1), *arguments)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: {in_the_way}/step-2 could not be written (Not a directory): ")
    assert in_the_way.read_text() == "a file where a folder is to be made"


def test_which_are_kept_and_that_waiting_writes_the_same(crew: Any, tmp_path: Path) -> None:
    """And what a killed save or deletion left goes with the next deletion."""
    arguments = [*small(tmp_path), "steps=5", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=3"]
    leftover = partial_of(tmp_path / "run" / "checkpoints" / "step-4711", 5)
    leftover.mkdir(parents=True)
    process = trained(crew(1), *arguments)
    assert process.returncode == 0, process.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert names_in(checkpoints) == ["step-3", "step-5"]
    waited = tmp_path / "waited"
    process = trained(crew(1), *arguments, f"run.dir={waited}", "checkpoint.asynchronous=false", "stop_at=3")
    assert process.returncode == 0, process.stderr
    assert names_in(waited / "checkpoints") == ["step-3"]
    for name in ("rank-00000.safetensors", "tokenizer/tokenizer.json"):
        path = Path("step-3") / name
        assert (checkpoints / path).read_bytes() == (waited / "checkpoints" / path).read_bytes()


class Exploit:
    """Unpickled it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_run(crew: Any, stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    """In the place of a rank's file, all sizes and checksums forged, and in that of the manifest."""
    import zlib

    folder, arguments = stopped
    checkpoints, proof = tmp_path / "run" / "checkpoints", tmp_path / "it-ran"
    planted = pickle.dumps(Exploit(proof))
    for step in (1, 2):
        shutil.copytree(folder / "run" / "checkpoints" / f"step-{step}", checkpoints / f"step-{step}")
    (checkpoints / "step-2" / "manifest.json").write_bytes(planted)
    (checkpoints / "step-1" / "rank-00000.safetensors").write_bytes(planted)
    forged = {"bytes": len(planted), "crc32": f"{zlib.crc32(planted):08x}"}
    edit(checkpoints / "step-1", lambda manifest: manifest["files"]["rank-00000.safetensors"].update(forged))
    process = trained(crew(1), *arguments, f"run.dir={tmp_path / 'run'}", "parallel.tensor=1")
    assert process.returncode == 2
    assert "step-2: manifest.json cannot be read" in process.stdout
    assert "step-1: manifest.json was changed after it was written (rank-00000.safetensors is smaller" in process.stdout
    assert not proof.exists()
    pickle.loads(planted)
    assert proof.exists()  # it would have


SUSPECT = re.compile(
    r"[pP]ickle|dill|joblib|shelve|marshal|torch\.(load|save)|(np|numpy)\.load|PackageImporter|(save|load)_checkpoint"
)


def unpickling(source: str) -> list[str]:
    """Ways to run code that a file carries, in a module's source."""
    found = []
    for node in ast.walk(ast.parse(source)) if SUSPECT.search(source) else ():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            modules = {part for name in names for part in name.split(".")}
            found += sorted(
                modules & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load")
            if called in ("torch.save", "np.load", "numpy.load", "torch.package.PackageImporter") and (
                called == "torch.save" or options.get("allow_pickle", "False") != "False"
            ):
                found.append(called)
            if node.func.attr in ("save_checkpoint", "load_checkpoint"):
                found.append(node.func.attr)
    return found


# These import pickle and run no foreign one: unpicklers that know no class, and errors between our own processes.
KNOWN = {
    "opt_parallel/huggingface/pickled.py": ["pickle"],
    "opt_parallel/metaseq/pickled.py": ["pickle"],
    "opt_parallel/data/store/workers.py": ["pickle"],
    "opt_parallel/benchmarks/checkpoints.py": ["save_checkpoint", "load_checkpoint"],  # DeepSpeed's, to compare with
}


def test_the_package_neither_writes_nor_reads_pickles() -> None:
    modules = [*(ROOT / "opt_parallel").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "train.py"]
    found = {path.relative_to(ROOT).as_posix(): unpickling(path.read_text()) for path in modules}
    assert {path: calls for path, calls in found.items() if calls} == KNOWN
    assert unpickling("import pickle\ntorch.load(p)\ntorch.save(x, p)\nnp.load(p, allow_pickle=True)") == [
        "pickle", "torch.load", "torch.save", "np.load",
    ]  # fmt: skip
    assert unpickling("torch.load(p, weights_only=True)\nnp.load(p)") == []
