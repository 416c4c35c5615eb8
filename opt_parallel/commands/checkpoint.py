"""Inspect a run's checkpoints.

opt-parallel checkpoint list runs/opt-125m                              # all, including damaged ones
opt-parallel checkpoint show runs/opt-125m/checkpoints/step-1000
opt-parallel checkpoint verify runs/opt-125m/checkpoints/step-1000      # exits with status 1 if damaged
opt-parallel checkpoint diff …/step-1000 …/step-2000                    # their layouts may differ
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from opt_parallel.config.options import parsed
from opt_parallel.config.paths import reach
from opt_parallel.metaseq.files import is_metaseq
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.runtime.log import aligned, bytes_in_words, quiet_libraries

NONE = "—"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    every = verbs.add_parser("list", help="list the checkpoints of a run")
    every.add_argument("run", type=Path, help="the run's folder")
    for verb, meaning in (
        ("show", "show the content of a checkpoint, or of a metaseq folder"),
        ("verify", "read all files and compare their checksums"),
    ):
        one = verbs.add_parser(verb, help=meaning)
        one.add_argument("folder", type=Path, help="…/checkpoints/step-<N>")
    two = verbs.add_parser("diff", help="show the tensors that differ most between two checkpoints")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.add_argument("--most", type=int, default=20, help="maximum number of tensors to print (default 20)")
    return parser


def main() -> int:
    arguments = parsed(parser())
    quiet_libraries()
    return {"list": list_run, "show": show, "verify": verify, "diff": diff}[arguments.verb](arguments)


def list_run(arguments: argparse.Namespace) -> int:
    from opt_parallel.tools.inspect import layout_of, listed

    lines = [["checkpoint", "tokens", "size", "layout", "train loss", "validation loss", "written", "state"]]
    for each in listed(arguments.run):
        known = each.manifest
        tokens = f"{known['clock']['tokens']:,}" if known else NONE
        losses = [_loss(each.losses[kind]) for kind in ("train", "validation")]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.folder.stat().st_mtime))
        layout = layout_of(known) if known else NONE
        lines.append([each.folder.name, tokens, bytes_in_words(each.size), layout, *losses, when, each.state])
    print(aligned(lines))
    return 0


def show(arguments: argparse.Namespace) -> int:
    from opt_parallel.checkpoint.fragments import read_tables
    from opt_parallel.checkpoint.manifest import read_manifest
    from opt_parallel.huggingface.card import metrics_of
    from opt_parallel.tools.inspect import groups_of, layout_of, losses_at

    folder = arguments.folder
    if (metaseq := reach("", folder)) and is_metaseq(metaseq):
        from opt_parallel.tools.metaseq import described

        print(described(folder))
        return 0
    manifest = read_manifest(folder)
    clock = manifest["clock"]
    losses = losses_at(clock["step"], metrics_of(folder, clock["step"]))
    facts = {
        "step": f"{clock['step']:,} of {manifest['config']['steps']:,}; {manifest['updates']:,} updated the weights",
        "seen": f"{clock['samples']:,} samples, {clock['tokens']:,} tokens",
        "layout": layout_of(manifest),
        "losses": f"training {_loss(losses['train'])}, validation {_loss(losses['validation'])}",
        "loss scale": _pairs(manifest["loss_scale"]) if manifest["loss_scale"] else "none",
        "device": manifest.get("device", "not recorded"),
        "versions": _pairs(manifest["versions"]),
        "format": str(manifest["format"]),
    }
    if base := manifest.get("base"):  # only LoRA checkpoints
        facts["base"] = f"{base['checkpoint']} (checksum {base['checksum']})"
    print(aligned([[name, value] for name, value in facts.items()]))
    groups = groups_of(manifest)
    lines = [["tensors", "full shape", "split", "number", "parameters"]]
    for like in groups:
        shape = " × ".join(map(str, like.shape))
        lines.append([like.name, shape, like.split, str(like.number), f"{like.parameters:,}"])
    lines.append(["all", "", "", str(sum(g.number for g in groups)), f"{sum(g.parameters for g in groups):,}"])
    print(f"\n{aligned(lines)}")
    lines = [["file", "bytes", "fragments", "elements", "CRC-32"]]
    tables = read_tables(folder, manifest)
    for name, written in manifest["files"].items():
        counts = [count for *_, count in tables.get(name, ())]
        lines.append([name, f"{written['bytes']:,}", str(len(counts)), f"{sum(counts):,}", written["crc32"]])
    print(f"\n{aligned(lines)}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from opt_parallel.checkpoint.damage import damage_in
    from opt_parallel.checkpoint.manifest import MANIFEST

    if not (arguments.folder / MANIFEST).exists():
        raise UserError(f"{arguments.folder} has no {MANIFEST}: name a checkpoint, …/checkpoints/step-<N>")
    wrong = damage_in(arguments.folder)
    for each in wrong:
        print(f"{arguments.folder}: {each}")
    if not wrong:
        print(f"{arguments.folder} is complete: every file matches its checksum")
    return 1 if wrong else 0


def diff(arguments: argparse.Namespace) -> int:
    from opt_parallel.checkpoint.damage import check_sizes
    from opt_parallel.checkpoint.manifest import changes
    from opt_parallel.checkpoint.reader import CheckpointReader
    from opt_parallel.tools.inspect import KINDS, differences, only_in_one

    if arguments.most < 1:
        raise UserError(f"--most {arguments.most} must be at least 1")
    a, b = CheckpointReader(arguments.a), CheckpointReader(arguments.b)
    for reader in (a, b):
        check_sizes(reader)
    sections = ("clock", "updates", "loss_scale", "layout", "device", "versions", "config", "text", "base")
    before, after = ({name: each.manifest.get(name) for name in sections} for each in (a, b))
    rows = changes(before, after)
    heading = ["differs", str(a.folder), str(b.folder)]
    print(aligned([heading, *rows]) if rows else "all settings, versions, devices and texts are equal")
    apart = only_in_one(a, b)
    print("".join(f"\n{line}" for line in apart), end="\n" if apart else "")
    found = sorted(differences(a, b), key=lambda each: -each.rank)
    differing = [each for each in found if each.rank > 0]
    if not differing:
        print(f"\nall {len(found)} tensors are equal, and so are their moments")
        return 0
    lines = [["", *(cell for kind in KINDS for cell in (kind, ""))], ["tensor", *["max |Δ|", "‖Δ‖/‖a‖"] * len(KINDS)]]
    for each in differing[: arguments.most]:
        cells = [(NONE, NONE) if both is None else (f"{both[0]:.3g}", f"{both[1]:.3g}") for both in each.kinds.values()]
        lines.append([each.name, *(cell for pair in cells for cell in pair)])
    print(f"\n{aligned(lines)}")
    print(f"{len(differing)} of {len(found)} tensors differ, sorted by ‖Δ‖/‖a‖")
    return 0


def _loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def run() -> None:
    with reporting():
        sys.exit(main())
