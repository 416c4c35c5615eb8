"""A changed manifest, or files that are not what it says, are damage: reported, renamed, the checkpoint before used."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import Layout
from resumed_runs import go, run_of, with_tokenizer
from tampering import edit, edit_tables, forge, to_format_1

from opt_parallel.checkpoint.folders import retire
from opt_parallel.checkpoint.fragments import TABLES
from opt_parallel.config.run import Run
from opt_parallel.parallel.precision import device_model
from opt_parallel.parallel.topology import Topology, local_device

NAME = "decoder.final_layer_norm.weight"
FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
FUTURE = "an-optimizer-of-the-future"
ALL_KINDS = ["weights", "exp_avg", "exp_avg_sq"]


def spread(folder: Path, layout: Layout) -> Run:
    return run_of(folder, layout, 6, model={"num_hidden_layers": 1, "vocab_size": 101})


@pytest.fixture(scope="module")
def saved(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks at tensor 2, saved at steps 2 and 4."""
    folder = with_tokenizer(tmp_path_factory.mktemp("saved") / "run")
    crew(2)(go, spread(folder, Layout(tensor=2, stage=1)), 0, 4, (2, 4))
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


WAYS = ("resume", "inspect", "open")
IN_TURN = (*("inspect", "open") * 4, "resume")  # which also reads the checkpoint before


def read_by_all(folder: Path, topology: Topology, ways: Sequence[str] = WAYS) -> list[str]:
    """What each of these ways to read a run's checkpoint of step 4 makes of it: `damage` and what it says, or `read`
    and a digest of all that it would go on with."""
    from opt_parallel.checkpoint.damage import damage_in
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.runtime.errors import UserError
    from opt_parallel.tools.inspect import listed

    step, answers = folder / "checkpoints" / "step-4", []
    if "resume" in ways:
        answers.append(resumed(folder, topology))
    if "inspect" in ways:
        wrong = damage_in(step)
        answers.append(f"damage {step}: {wrong[0]}" if wrong else f"read {digest(step)}")
        assert [each.step for each in listed(folder)] == [2, 4]
    if "open" in ways:
        try:
            open_checkpoint(step, checksums=True)
            answers.append(f"read {digest(step)}")
        except UserError as error:
            answers.append(f"damage {error}")
    assert all("\n" not in answer for answer in answers)
    return answers


def read_once(folder: Path) -> list[str]:
    """On the crew: what each way to read it makes of a checkpoint."""
    with Topology.open(1) as topology:
        return read_by_all(folder, topology)


def resumed(folder: Path, topology: Topology) -> str:
    """What `resume=auto` makes of it. What was renamed is put back."""
    from opt_parallel.checkpoint.store import Store

    checkpoints, out = folder / "checkpoints", io.StringIO()
    run = spread(folder, Layout())
    with contextlib.redirect_stdout(out):
        store = Store(run, topology, folder / "tokenizer")
        reader = store.find()
        store.finish()
    assert reader is not None
    if reader.folder.name == "step-4":
        return f"read {digest(reader.folder)}"
    (aside,) = checkpoints.glob("step-4.damaged*")
    line = out.getvalue().rstrip("\n")
    assert line.startswith(f"warning: {checkpoints / 'step-4'}: ")
    assert line.endswith(f"it is renamed to {aside.name}")
    os.replace(aside, checkpoints / "step-4")
    return f"damage {line}"


def digest(folder: Path) -> str:
    """Of everything that a manifest says, read without our help."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return str(zlib.crc32(json.dumps(manifest | {"checksum": None}, sort_keys=True).encode()))


def count_verdicts(folder: Path, file: str, changes: list[tuple[int, int]]) -> Counter[str]:
    """On the crew: by what it came to, how many of the `changes`, each of one byte of the file."""
    with Topology.open(1) as topology:
        return count_verdicts_of(folder, file, changes, topology)


def count_verdicts_of(folder: Path, file: str, changes: list[tuple[int, int]], topology: Topology) -> Counter[str]:
    path = folder / "checkpoints" / "step-4" / file
    content, before, counts = path.read_bytes(), digest(path.parent), Counter[str]()
    for position, value in changes:
        path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        try:
            answers = read_by_all(folder, topology)
        except Exception as error:
            counts[f"{type(error).__name__}: {error} at {position}, {value}"] += 1
            for aside in path.parent.parent.glob("step-4.damaged*"):
                os.replace(aside, path.parent)
            continue
        if all(answer.startswith("damage ") for answer in answers):
            counts["renamed"] += 1
        elif all(answer == f"read {before}" for answer in answers):
            counts["no effect"] += 1
        else:
            counts[f"silent: {answers} at {position}, {value}"] += 1
    path.write_bytes(content)
    return counts


def test_flipped_bits_of_the_tables(crew: Any, run: Path) -> None:
    content, draw = (run / "checkpoints" / "step-4" / TABLES).read_bytes(), random.Random(14)
    places = draw.sample(range(len(content)), 4)
    changes = [(position, content[position] ^ 1 << draw.randrange(8)) for position in places]
    (counts,) = crew(1)(count_verdicts, run, TABLES, changes)
    assert counts == {"renamed": 4}


def test_flipped_bits_and_changed_digits_of_a_manifest(crew: Any, run: Path, request: pytest.FixtureRequest) -> None:
    """None is silent, none a traceback."""
    flips, digits = (1000, 500) if request.config.getoption("long") else (15, 8)
    content, draw = (run / "checkpoints" / "step-4" / "manifest.json").read_bytes(), random.Random(14)
    changes = []
    for _ in range(flips):
        position = draw.randrange(len(content))
        changes.append((position, content[position] ^ 1 << draw.randrange(8)))
    places = [position for position, byte in enumerate(content) if byte in b"0123456789"]
    for position in draw.choices(places, k=digits):
        changes.append((position, draw.choice([byte for byte in b"0123456789" if byte != content[position]])))
    (counts,) = crew(1)(count_verdicts, run, "manifest.json", changes)
    print(dict(counts))
    assert counts.keys() <= {"renamed", "no effect"}
    assert counts["renamed"] > 0.95 * len(changes)


def as_text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A change of the manifest's bytes."""

    def apply(step: Path) -> None:
        path = step / "manifest.json"
        path.write_bytes(change(path.read_bytes()))

    return apply


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "cut": lambda text: text[: len(text) // 2],
    "without its end": lambda text: text[:-1],
    "zeros": lambda text: bytes(len(text)),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "not UTF-8": lambda text: text.replace(b"opt", b"\xff\xfe", 1),
    "twice": lambda text: text + text,
    "a list": lambda text: b"[" + text + b"]",
    "null": lambda text: b"null",
    "another object": lambda text: b'{"name": "a web page"}',
    "deep": lambda text: b"[" * 200_000,
    "a deep object": lambda text: b'{"a":' * 200_000,
    "written anew by a tool": lambda text: json.dumps(json.loads(text), indent=1).encode(),
    "unknown format": lambda text: text.replace(b'"format": 2', b'"format": 3'),
    "format in words": lambda text: text.replace(b'"format": 2', b'"format": "2"'),
}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def rename_file(manifest: dict[str, Any], name: str) -> None:
    manifest["files"][name] = manifest["files"].pop(FIRST)


EMBEDDING = "decoder.embed_tokens.weight"
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a clock in words": lambda m: m["clock"].update(step="4"),
    "a clock of half a step": lambda m: m["clock"].update(samples=2.5),
    "a clock that is true": lambda m: m["clock"].update(tokens=True),
    "a negative clock": lambda m: m["clock"].update(samples=-1),
    "an enormous clock": lambda m: m["clock"].update(samples=10**400),
    "no clock": lambda m: m.pop("clock"),
    "a clock of another step": lambda m: m["clock"].update(step=5),
    "no updates": lambda m: m.update(updates=0),
    "half an update": lambda m: m.update(updates=3.5),
    "a loss scale that is infinite": lambda m: m.update(
        loss_scale={"scale": float("inf"), "good_steps": 0, "moved_window": None}
    ),
    "a loss scale that is none": lambda m: m.update(
        loss_scale={"scale": float("nan"), "good_steps": 0, "moved_window": None}
    ),
    "a loss scale of zero": lambda m: m.update(loss_scale={"scale": 0.0, "good_steps": 0, "moved_window": None}),
    "half a loss scale": lambda m: m.update(loss_scale={"scale": 1.0}),
    "a list for a layout": lambda m: m.update(layout=[]),
    "a list for a configuration": lambda m: m.update(config=[]),
    "a configuration without a model": lambda m: m["config"].pop("model"),
    "a deep configuration": lambda m: m["config"].update(extra=nested(600)),
    "a deep model": lambda m: m["config"]["model"].update(dropout=nested(40)),
    "a deep text": lambda m: m.update(text={"a": nested(600)}),
    "an enormous model": lambda m: m["config"]["model"].update(num_hidden_layers=10**9),
    "a model of enormous numbers": lambda m: m["config"]["model"].update(ffn_dim=10**4000),
    "a model that cannot be": lambda m: m["config"]["model"].update(num_attention_heads=7),
    "a model in words": lambda m: m["config"]["model"].update(hidden_size="wide"),
    "a list for an optimizer": lambda m: m["config"].update(optimizer=[]),
    "a list for what is kept": lambda m: m["config"].update(checkpoint=[]),
    "none are kept": lambda m: m["config"]["checkpoint"].update(keep=0),
    "a base without LoRA": lambda m: m.update(base={"checkpoint": "a", "checksum": "b"}),
    "LoRA without a base": lambda m: m["config"]["task"]["lora"].update(rank=8),
    "labels of numbers": lambda m: m.update(labels={"names": [1], "problem_type": None}),
    "tensors in a list": lambda m: m.update(tensors=list(m["tensors"])),
    "no tensors": lambda m: m.update(tensors={}),
    "a tensor without a fragment": lambda m: m["tensors"].update(extra={"shape": [1], "dim": 0, "parts": 1}),
    "a tensor of no shape": lambda m: m["tensors"][NAME].update(shape=[]),
    "a tensor of many dims": lambda m: m["tensors"][NAME].update(shape=[1] * 5000),
    "a tensor of an enormous shape": lambda m: m["tensors"][NAME].update(shape=[10**18]),
    "a tensor in too many parts": lambda m: m["tensors"][NAME].update(parts=10**9),
    "a tensor split elsewhere": lambda m: m["tensors"][EMBEDDING].update(dim=1),
    "a dim that is not there": lambda m: m["tensors"][EMBEDDING].update(dim=2),
    "another shape of as many": lambda m: m["tensors"][NAME].update(shape=[8, 8]),
    "files in a list": lambda m: m.update(files=list(m["files"])),
    "no files": lambda m: m.update(files={}),
    "a file of negative size": lambda m: m["files"][FIRST].update(bytes=-1),
    "a file of enormous size": lambda m: m["files"][FIRST].update(bytes=10**18),
    "a checksum that is a number": lambda m: m["files"][FIRST].update(crc32=5),
    "another checksum": lambda m: m["files"][FIRST].update(crc32="00000000"),
    "a file above": lambda m: rename_file(m, f"../step-4/{FIRST}"),
    "an absolute file": lambda m: rename_file(m, "/etc/passwd"),
    "a device": lambda m: rename_file(m, "/dev/zero"),
    "the folder itself": lambda m: rename_file(m, "."),
    "a file without a name": lambda m: rename_file(m, ""),
    "a name of a thousand letters": lambda m: rename_file(m, "a" * 5000),
    "a name with a zero": lambda m: rename_file(m, "rank\0"),
    "a name with a line break": lambda m: rename_file(m, "rank\n1"),
    "half a letter": lambda m: rename_file(m, "\ud800"),
    "no format": lambda m: m.pop("format"),
    "a format in words": lambda m: m.update(format="2"),
    "half a format": lambda m: m.update(format=1.5),
    "format 0": lambda m: m.update(format=0),
    "an earlier format": lambda m: m.update(format=1),
    "no tables": lambda m: m["files"].pop(TABLES),
    "tables of enormous size": lambda m: m["files"][TABLES].update(bytes=10**12),
    "another checksum of the tables": lambda m: m["files"][TABLES].update(crc32="00000000"),
    "no file of a table": lambda m: m["files"].pop(SECOND),
}


def fragment(manifest: dict[str, Any], file: str = FIRST, name: str = NAME) -> dict[str, Any]:
    return next(each for each in manifest["files"][file]["fragments"] if each["name"] == name)


CHANGES_OF_FORMAT_1: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no fragments": lambda m: m["files"][FIRST].pop("fragments"),
    "a later format": lambda m: m.update(format=2),
    "fragments in a dict": lambda m: m["files"][FIRST].update(fragments={}),
    "a hole": lambda m: m["files"][FIRST]["fragments"].remove(fragment(m)),
    "a smaller fragment": lambda m: fragment(m).update(count=63),
    "a fragment of nothing": lambda m: fragment(m).update(count=0),
    "a moved fragment": lambda m: fragment(m).update(start=1),
    "a fragment beyond the end": lambda m: fragment(m).update(start=10**15),
    "an enormous fragment": lambda m: fragment(m).update(count=10**15),
    "a fragment of another tensor": lambda m: fragment(m).update(name="decoder.final_layer_norm.bias"),
    "a fragment of no tensor": lambda m: fragment(m).update(name="nothing"),
    "a fragment of another part": lambda m: fragment(m).update(part=1),
    "a fragment twice in a file": lambda m: m["files"][FIRST]["fragments"].append(fragment(m)),
    "a fragment twice in two files": lambda m: m["files"][SECOND]["fragments"].append(fragment(m)),
    "a moment missing": lambda m: fragment(m).update(kinds=["weights", "exp_avg"]),
    "no weights": lambda m: fragment(m).update(kinds=["exp_avg", "exp_avg_sq"]),
    "a moment twice": lambda m: fragment(m).update(kinds=["weights", "exp_avg", "exp_avg"]),
    "an unknown moment": lambda m: fragment(m).update(kinds=["weights", "exp_avg", "exp_max"]),
    "no kinds": lambda m: fragment(m).update(kinds=[]),
    "kinds in words": lambda m: fragment(m).update(kinds="weights"),
}


Tables = dict[str, np.ndarray]


def in_row(column: int, value: int) -> Callable[[Tables, int], None]:
    """Change the row of the tensor NAME in the first table."""

    def apply(tables: Tables, number: int) -> None:
        tables[FIRST][tables[FIRST][:, 0] == number, column] = value

    return apply


def move_row(tables: Tables, number: int, to: str, keep: bool) -> None:
    """Append the row of the tensor NAME in the first table to the table `to`."""
    rows = tables[FIRST][:, 0] == number
    tables[to] = np.concatenate([tables[to], tables[FIRST][rows]])
    if not keep:
        tables[FIRST] = tables[FIRST][~rows]


def exchange_tables(tables: Tables) -> None:
    tables[FIRST], tables[SECOND] = tables[SECOND], tables[FIRST]


TENSOR, PART, START, COUNT = range(4)
CHANGES_OF_TABLES: dict[str, Callable[[Tables, int], Any]] = {
    "a hole": lambda t, n: t.update({FIRST: t[FIRST][t[FIRST][:, 0] != n]}),
    "a smaller fragment": in_row(COUNT, 63),
    "a fragment of nothing": in_row(COUNT, 0),
    "a fragment of less": in_row(COUNT, -64),
    "a moved fragment": in_row(START, 1),
    "a negative start": in_row(START, -1),
    "a fragment beyond the end": in_row(START, 10**15),
    "an enormous fragment": in_row(COUNT, 2**63 - 1),
    "an enormous start": in_row(START, 2**63 - 1),
    "a fragment of no tensor": in_row(TENSOR, 10**6),
    "a negative tensor": in_row(TENSOR, -1),
    "a fragment of another part": in_row(PART, 1),
    "a negative part": in_row(PART, -1),
    "an enormous part": in_row(PART, 2**63 - 1),
    "a fragment of another tensor": lambda t, n: in_row(TENSOR, n - 1)(t, n),
    "a fragment twice in a file": lambda t, n: move_row(t, n, FIRST, keep=True),
    "a fragment twice in two files": lambda t, n: move_row(t, n, SECOND, keep=True),
    "a fragment in another file": lambda t, n: move_row(t, n, SECOND, keep=False),
    "a table missing": lambda t, n: t.pop(SECOND),
    "no tables": lambda t, n: t.clear(),
    "a table of nothing": lambda t, n: t.update({FIRST: t[FIRST][:0]}),
    "tables exchanged": lambda t, n: exchange_tables(t),
    "a table of no file": lambda t, n: t.update({"rank-00002.safetensors": t[FIRST][:0]}),
    "a table of a file above": lambda t, n: t.update({f"../step-4/{FIRST}": t.pop(FIRST)}),
    "a table of the tokenizer": lambda t, n: t.update({"tokenizer/tokenizer.json": t.pop(FIRST)}),
    "three columns": lambda t, n: t.update({FIRST: np.ascontiguousarray(t[FIRST][:, :3])}),
    "a flat table": lambda t, n: t.update({FIRST: t[FIRST].reshape(-1)}),
    "a table of floats": lambda t, n: t.update({FIRST: t[FIRST].astype(np.float64)}),
    "a table of small integers": lambda t, n: t.update({FIRST: t[FIRST].astype(np.int32)}),
}


def swap_ranks(step: Path) -> None:
    first, second = (step / name for name in (FIRST, SECOND))
    os.rename(first, step / "aside")
    os.rename(second, first)
    os.rename(step / "aside", second)


def link_out(step: Path) -> None:
    os.rename(step / FIRST, step.parent.parent / FIRST)
    (step / FIRST).symlink_to(step.parent.parent / FIRST)


def in_its_place(make: Callable[[Path], Any], name: str = FIRST) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        (step / name).unlink()
        make(step / name)

    return apply


FILES: dict[str, Callable[[Path], Any]] = {
    "ranks exchanged": swap_ranks,
    "a file of another step": lambda step: shutil.copy(step.with_name("step-2") / FIRST, step / FIRST),
    "the manifest of another step": lambda step: shutil.copy(step.with_name("step-2") / "manifest.json", step),
    "another step": lambda step: (shutil.rmtree(step), shutil.copytree(step.with_name("step-2"), step)),
    "a link out": link_out,
    "a link to itself": in_its_place(lambda path: path.symlink_to(path)),
    "a link to a device": in_its_place(lambda path: path.symlink_to("/dev/zero")),
    "a pipe": in_its_place(os.mkfifo),
    "a folder": in_its_place(os.mkdir),
    "no tables": lambda step: (step / TABLES).unlink(),
    "cut tables": lambda step: os.truncate(step / TABLES, 1000),
    "tables of another checkpoint": lambda step: shutil.copy(step / FIRST, step / TABLES),
    "tables that are a device": in_its_place(lambda path: path.symlink_to("/dev/zero"), TABLES),
    "a tokenizer that is a device": in_its_place(lambda path: path.symlink_to("/dev/zero"), "tokenizer/tokenizer.json"),
    "no tokenizer": lambda step: shutil.rmtree(step / "tokenizer"),
}


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A safetensors file whose header lies."""

    def apply(content: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[end:]

    return apply


WEIGHTS = f"weights/{NAME}"
HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "beyond the end": with_header(lambda header: header[WEIGHTS].update(data_offsets=[10**12, 10**12 + 256])),
    "negative": with_header(lambda header: header[WEIGHTS].update(data_offsets=[-256, 0])),
    "overlapping": with_header(lambda header: header[WEIGHTS].update(data_offsets=[0, 256])),
    "of another type": with_header(lambda header: header[WEIGHTS].update(dtype="I32")),
    "of another shape": with_header(lambda header: header[WEIGHTS].update(shape=[32])),
    "without a tensor": with_header(lambda header: header.pop(WEIGHTS)),
    "by another name": with_header(lambda header: header.update(other=header.pop(WEIGHTS))),
    "moments exchanged for more weights": with_header(
        lambda header: header.update({f"weights/{NAME}2": header.pop(f"exp_avg/{NAME}")})
    ),
    "twice": with_header(
        lambda header: json.dumps(header).encode()[:-1] + b', "' + WEIGHTS.encode() + b'": '
        + json.dumps(header[f"exp_avg/{NAME}"]).encode() + b"}"
    ),
    "deep": with_header(lambda header: b"[" * 200_000),
    "a list": with_header(lambda header: b"[]"),
    "no JSON": with_header(lambda header: b"\x80\x04K\x01."),
    "enormous": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "nothing": lambda content: b"",
    "short": lambda content: content[:5],
}  # fmt: skip


TABLE_HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "beyond the end": with_header(lambda header: header[FIRST].update(data_offsets=[10**12, 10**12 + 256])),
    "of an unknown type": with_header(lambda header: header[FIRST].update(dtype="F8_E5M2")),
    "of an enormous shape": with_header(lambda header: header[FIRST].update(shape=[2**60, 4])),
    "deep": with_header(lambda header: b"[" * 200_000),
    "nothing": lambda content: b"",
}


def forged(change: Callable[[bytes], bytes], name: str = FIRST) -> Callable[[Path], None]:
    """Change a file, its size and checksum in the manifest made right again."""
    return lambda step: forge(step, name, change((step / name).read_bytes()))


def tabled(change: Callable[[Tables, int], Any]) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        number = sorted(json.loads((step / "manifest.json").read_text())["tensors"]).index(NAME)
        edit_tables(step, lambda tables: change(tables, number))

    return apply


def in_format_1(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of a checkpoint in format 1, whose manifests had no checksum at first."""
    return lambda step: (to_format_1(step), edit(step, change, checksum=False))  # type: ignore[func-returns-value]


def edited(change: Callable[[dict[str, Any]], Any], checksum: bool) -> Callable[[Path], None]:
    return lambda step: edit(step, change, checksum)


CASES: dict[str, Callable[[Path], Any]] = {
    **{f"text: {name}": as_text(change) for name, change in TEXTS.items()},
    **{f"checked: {name}": edited(change, True) for name, change in CHANGES.items()},
    **{f"unchecked: {name}": edited(change, False) for name, change in CHANGES.items()},
    **FILES,
    **{f"header: {name}": forged(change) for name, change in HEADERS.items()},
    **{f"tables: {name}": tabled(change) for name, change in CHANGES_OF_TABLES.items()},
    **{f"tables: {name}": forged(change, TABLES) for name, change in TABLE_HEADERS.items()},
    **{f"format 1: {name}": in_format_1(change) for name, change in CHANGES_OF_FORMAT_1.items()},
}


def verdicts(folder: Path, scratch: Path, names: list[str], all_ways: bool) -> dict[str, list[str]]:
    """On the crew: by case, what each way to read the checkpoint makes of it, or one of the ways in turn."""
    found = {}
    with Topology.open(1) as topology:
        for place, name in enumerate(names):
            shutil.copytree(folder, scratch / "run")
            CASES[name](scratch / "run" / "checkpoints" / "step-4")
            ways = WAYS if all_ways else [IN_TURN[place % len(IN_TURN)]]
            try:
                found[name] = read_by_all(scratch / "run", topology, ways)
            except BaseException as error:
                found[name] = [f"{type(error).__name__}: {error}"]
            shutil.rmtree(scratch / "run")
    return found


def test_whatever_is_wrong_is_damage(crew: Any, saved: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With a checksum that was made right again, and without one, as in earlier versions' manifests. By default each
    case is read in one way, and every third change without a checksum; with --long all are, in all ways."""
    names, everything = list(CASES), bool(request.config.getoption("long"))
    unchecked = [name for name in names if name.startswith("unchecked: ")]
    left_out = set() if everything else {name for place, name in enumerate(unchecked) if place % 3}
    (found,) = crew(1)(verdicts, saved, tmp_path, [name for name in names if name not in left_out], everything)
    assert len(found) > 150
    wrong = {
        name: answers
        for name, answers in found.items()
        if not all(answer.startswith("damage ") and "step-4" in answer for answer in answers)
    }
    assert not wrong, "\n".join(f"{name}: {answers}" for name, answers in wrong.items())


def refusals(folder: Path) -> list[str]:
    """On the crew: how each way to read the run's checkpoint of step 4 refuses it, which is not damaged."""
    from opt_parallel.checkpoint.damage import damage_in
    from opt_parallel.checkpoint.manifest import Damaged
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.runtime.errors import UserError

    step, found = folder / "checkpoints" / "step-4", []
    with Topology.open(1) as topology:
        for read in (lambda: resumed(folder, topology), lambda: damage_in(step), lambda: open_checkpoint(step)):
            with pytest.raises(UserError) as raised:
                read()
            assert not isinstance(raised.value, Damaged)  # which would be renamed
            found.append(str(raised.value))
    return found


def test_an_unknown_optimizer_is_refused(crew: Any, run: Path) -> None:
    """A later version's checkpoint: it is not damaged, and keeps its name."""
    step = run / "checkpoints" / "step-4"
    edit(step, lambda manifest: manifest["config"]["optimizer"].update(name=FUTURE))
    (lines,) = crew(1)(refusals, run)
    for line in lines:
        assert line.startswith(f"{step} was trained with optimizer.name={FUTURE!r}, which this version does not have")
        assert "adamw" in line
        assert line.endswith("or use the version that wrote it")
    assert (step / "manifest.json").is_file()


def test_another_optimizer_does_not_resume(crew: Any, tmp_path: Path) -> None:
    """Not even from step 0, where there are no moments that could tell."""
    folder = with_tokenizer(tmp_path / "run")
    crew(1)(go, spread(folder, Layout()), 0, 0, (0,))
    step = folder / "checkpoints" / "step-0"
    edit(step, lambda manifest: manifest["config"]["optimizer"].update(name=FUTURE))
    (line,) = crew(1)(refused, folder)
    assert line.startswith(f"{step} was trained with optimizer.name={FUTURE!r}, this run has adamw: ")
    assert line.endswith(f"set the value back, or start in another run.dir with init_from={step}")
    edit(step, lambda manifest: manifest["config"].pop("optimizer"))  # a version that only had AdamW
    crew(1)(go, spread(folder, Layout()), 0, 1)


def refused(folder: Path) -> str:
    """On the crew: why the run does not resume."""
    from opt_parallel.runtime.errors import UserError

    with pytest.raises(UserError) as raised:
        go(spread(folder, Layout()), 0, 1)
    return str(raised.value)


def test_a_later_format_is_refused(crew: Any, run: Path) -> None:
    """It is not damaged either, and keeps its name."""
    step = run / "checkpoints" / "step-4"
    edit(step, lambda manifest: manifest.update(format=3))
    (lines,) = crew(1)(refusals, run)
    for line in lines:
        assert line.startswith(f"{step} has format 3, and this version reads formats up to 2")
    assert (step / "manifest.json").is_file()


def test_an_earlier_versions_manifest_is_read(crew: Any, run: Path) -> None:
    step = run / "checkpoints" / "step-4"
    to_format_1(step)
    edit(step, lambda manifest: [manifest.pop(key) for key in ("text", "base")], checksum=False)
    (answers,) = crew(1)(read_once, run)
    assert answers == [f"read {digest(step)}"] * 3


def test_another_device_is_a_change_and_an_unknown_one_is_not(crew: Any, run: Path) -> None:
    step = run / "checkpoints" / "step-4"
    device = json.loads((step / "manifest.json").read_text())["device"]
    assert device == device_model(local_device())
    edit(step, lambda manifest: manifest.update(device="a lost GPU"))
    edit(step, lambda manifest: manifest["versions"].update(cuda="1.0"))
    (table,) = crew(1)(said_at_a_resume, run)
    assert ["cuda", "1.0", torch.version.cuda or "none"] in [line.split() for line in table.splitlines()]
    assert ["device", "a lost GPU", device] in [re.split("  +", line.strip()) for line in table.splitlines()]
    edit(step, lambda manifest: [manifest.pop("device"), manifest["versions"].pop("cuda")])  # an earlier version's
    (table,) = crew(1)(said_at_a_resume, run)
    names = {line.split()[0] for line in table.splitlines()}
    assert "parallel.tensor" in names
    assert not {"cuda", "device"} & names


def said_at_a_resume(folder: Path) -> str:
    """Resume on a worker process without a step, and return what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        go(spread(folder, Layout()), 4, 4)
    return out.getvalue()


def test_names_that_no_save_gives_are_left_alone(crew: Any, run: Path) -> None:
    checkpoints = run / "checkpoints"
    others = ["step-04", "step-²", "step-٤", "step-", "step--4", "step-4.5", "step-1e1", "step- 4"]
    for name in others:
        shutil.copytree(checkpoints / "step-2", checkpoints / name)
    (answers,) = crew(1)(read_once, run)
    assert answers == [f"read {digest(checkpoints / 'step-4')}"] * 3
    assert {path.name for path in checkpoints.iterdir()} == {"step-2", "step-4", *others}


def test_a_name_that_is_taken_is_never_taken_again(tmp_path: Path) -> None:
    """A run that goes back again and again, whose earlier branches were deleted in part."""
    for kept, name in (("", "step-8.abandoned"), ("1", "step-8.abandoned"), ("", "step-8.abandoned2")):
        if kept == "1":
            shutil.move(tmp_path / "step-8.abandoned", tmp_path / "step-8.abandoned1")
        (tmp_path / "step-8").mkdir()
        (tmp_path / "step-8" / "file").touch()
        assert retire(tmp_path / "step-8", "abandoned").name == name
    assert {path.name for path in tmp_path.iterdir()} == {"step-8.abandoned", "step-8.abandoned1", "step-8.abandoned2"}
