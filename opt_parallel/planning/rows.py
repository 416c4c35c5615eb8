"""Workloads and measurements from rows of published tables.

A row of tests/planning/published.csv has an id, a network, a layout and what was measured. A row of golden.csv has the
arguments of one of Megatron-LM's functional tests. The rule for an empty or unknown cell is where the cell is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from opt_parallel.planning.cluster import DEVICES, Cluster, Link
from opt_parallel.planning.workload import Workload

Cells = dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """One measured number of a row.

    Bytes: `peak` of tensors, `reserved` by the allocator, `allocated` between steps, `states` and `activations`. Time:
    seconds of a step (`iter_s`), tokens a second of a device (`tok_s_gpu`), TFLOP/s of a device, those of the model
    (`tflops_gpu`) or with recomputation (`hardware_tflops_gpu`), or the model's as percent of the peak (`mfu_pct`)."""

    quantity: str
    value: float


@dataclass(frozen=True)
class Row:
    """A row that can be planned, or one with the reason `refused` why it cannot. `no_time` is the reason why its time
    cannot be planned."""

    id: str
    source: str
    measured: tuple[Measurement, ...] = ()
    workload: Workload | None = None
    cluster: Cluster | None = None
    no_time: str | None = None
    refused: str | None = None


class Refused(Exception):
    """The reason why a row cannot be planned."""


DETERMINISTIC = "on GB200, kernels whose results are equal from run to run have no fitted rate"
NONE = {"", "-", "–", "none", "n/a", "na", "nan", "null", "unknown"}  # a cell that says nothing
MAY_BE_ZERO = {"vp", "accum", "dp_or_fsdp", "kv_heads", "n_iter"}  # where 0 stands for none


def number(cell: str | None) -> float | None:
    """The first number of a cell such as `153 HARDWARE`, `~704` or `24 (inferred)`. None if there is none, or if the
    cell begins with a question mark. Raises: Refused if the number is not written out, or negative."""
    text = (cell or "").strip()
    plain = re.sub(r"(?<=\d)[,_' \u00a0\u202f](?=\d{3}(?!\d))", "", text)
    found = re.search(r"\d+(\.\d+)?(e[+-]?\d+)?", plain)
    if found is None or text.startswith("?"):
        return None
    before, after = plain[: found.start()].rstrip(), plain[found.end() :]
    if before.endswith(("-", "−")):
        raise Refused(f"a cell says {text!r}, and no column may be negative")
    if re.match(r",\d|\.\d|[kK]\b", after) or float(found[0]) > 1e18:
        raise Refused(f"a cell says {text!r}: write the digits out, with a point before decimals")
    return float(found[0])


def whole(cells: Cells, column: str, empty: int) -> int:
    """The cell's number as an integer, or `empty` if it says nothing. Raises: Refused for another text."""
    text = (cells.get(column) or "").strip()
    value = number(text)
    if value is None and (text.lower() in NONE or text.startswith("?")):
        return empty
    if value is None or value != int(value):
        raise Refused(f"the cell {column} says {text!r}, which is no whole number")
    if value == 0 and column not in MAY_BE_ZERO:
        raise Refused(f"the cell {column} says 0")
    return int(value) or empty


def require_numbers(cells: Cells, *columns: str) -> None:
    """Raise Refused unless each of the cells has a number."""
    for column in columns:
        if not whole(cells, column, 0):
            raise Refused(f"the cell {column} is empty")


# Hosts of the published measurements: devices a host, bytes/s of a device to another of its host and to another host.
HOSTS = {
    "a100": (8, Link(300e9, 6e-6), Link(25e9, 15e-6)),  # NVLink 3; one HDR InfiniBand port for each device
    "h100": (8, Link(450e9, 6e-6), Link(50e9, 15e-6)),  # NVLink 4; NDR
    "h200": (8, Link(450e9, 6e-6), Link(50e9, 15e-6)),
    "b200": (8, Link(900e9, 6e-6), Link(50e9, 15e-6)),  # NVLink 5
    "gb200": (4, Link(900e9, 6e-6), Link(900e9, 6e-6)),  # NVLink 5 across hosts
}


def cluster_of(gpu: str, count: int, per_host: int | None = None) -> Cluster:
    """The cluster of a row. A device without its memory is the one of the vendor's hosts: 80 GB of A100 and H100."""
    text = gpu.lower()
    family = next((name for name in ("gb200", "b200", "h200", "h100", "a100") if name in text.replace("_", "")), None)
    if family is None:
        raise Refused(f"the device {gpu!r} is unknown: A100, H100, H200, B200 and GB200 are known")
    size = {"h200": "141", "b200": "180", "gb200": "186"}.get(family, "80")
    sizes = {"a100": ("40/80", "80", "40"), "h100": ("80", "96")}.get(family, ())
    size = next((gigabytes for gigabytes in sizes if re.search(rf"(?<!\d){gigabytes}(?!\d)", text)), size)
    name = f"{family}-{'80' if size == '40/80' else size}gb{'-500w' if '500w' in text else ''}"
    if name not in DEVICES:
        raise Refused(f"the device {gpu!r} is unknown: of 500 W, only H100-96 is known")
    device = DEVICES[name]
    devices, within, between = HOSTS[family]
    devices = per_host or devices
    return Cluster(device, -(-count // devices), min(devices, count), within, between)
