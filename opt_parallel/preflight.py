"""Checks before step 1. All ranks must have the same code, libraries, settings and data, and devices and network must
work.

A failed check raises an error with the host and rank on every rank. If a device or the network hangs, its check fails
within a minute.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from opt_parallel.checkpoint.folders import steps_in
from opt_parallel.checkpoint.manifest import changes
from opt_parallel.config.compose import to_dict
from opt_parallel.config.data import DataConfig
from opt_parallel.config.model import Labels
from opt_parallel.config.paths import make_folder
from opt_parallel.config.run import Run
from opt_parallel.data.prepare import corpora
from opt_parallel.data.store.sameness import ends_of
from opt_parallel.model.build import network
from opt_parallel.optim import kind_of
from opt_parallel.parallel.shard import trained_shapes
from opt_parallel.parallel.topology import ALONE, DEVICE_TIMEOUT, Group, Topology
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import aligned, bytes_in_words, say
from opt_parallel.storage.atomic import remove

ALL_REDUCE_TIMEOUT = timedelta(seconds=20)
COMPARED = (
    "torch", "deepspeed", "numpy", "tokenizers", "datasets", "pyarrow", "safetensors", "accelerate", "hydra-core",
    "omegaconf",
)  # fmt: skip
ALL_REDUCE_BYTES = 8_000_000
PRODUCT = 512  # Number of rows and columns of the matrices that test a device.
SKEW = 5.0  # Maximum difference in seconds between two hosts' clocks without a warning.


def check_same(run: Run, topology: Topology) -> None:
    """Check that all ranks run the same code with the same libraries and settings. The comparison uses no device.

    Raises: UserError on every rank, with the first rank that differs from rank 0 and the difference."""
    own = {"code": {"opt-parallel": code_checksum()}, "libraries": _versions(), "settings": to_dict(run)}
    answers = topology.exchange(own)
    ways_out = {
        "code": "install the same version on every host",
        "libraries": "install the same versions on every host",
        "settings": "start every rank with the same command line, and the same configs",
    }
    for rank, theirs in enumerate(answers):
        for part, way_out in ways_out.items():
            rows = changes(answers[0][part], theirs[part])
            if rows:
                named = ", ".join(f"{key} {there} instead of {here}" for key, here, there in rows[:3])
                more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
                raise UserError(
                    f"{topology.where(rank)} has other {part} than {topology.where(0)}, {named}{more}: {way_out}",
                    shared=True,
                )


def preflight(run: Run, topology: Topology) -> list[str]:
    """Run the remaining checks, in an order that reports root causes first. Returns lines of text with the results.

    Raises: UserError on every rank."""
    started = time.perf_counter()
    topology.together(partial(_check_device, topology.device), DEVICE_TIMEOUT)
    speeds = [
        f"{name} {_slowest(topology, group)}"
        for name, group in (("tensor", topology.tensor), ("data", topology.data))
        if group.size > 1
    ]
    _check_shared_folder(run.folder, topology)
    disk = topology.together(lambda: _check_disk(run) if _is_first_on_host(topology) else "")
    _check_data(run.data, topology)
    skew = _warn_of_clocks(topology)
    hosts = len(set(topology.hosts))
    same = f"same code, libraries, settings and data on {topology.world.size} ranks, {hosts} host{'s' * (hosts > 1)}; "
    return [
        f"preflight: {same if topology.world.size > 1 else ''}{_device_name(topology.device)} multiplies correctly; "
        + (f"all-reduce of {bytes_in_words(ALL_REDUCE_BYTES)}: {', '.join(speeds)}; " if speeds else "")
        + disk
        + (f"; clocks within {skew:.1f} s" if hosts > 1 else "")
        + f"; {time.perf_counter() - started:.1f} s",
        *_grid(topology),
    ]


def make_run_folder(folder: Path) -> None:
    """Create the run's folder. Raises: UserError if the folder cannot be written."""
    make_folder("run.dir=", folder)


def code_checksum() -> str:
    """A checksum of the package's source files on this host."""
    package, checksum = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] == "configs" or "templates" in name.parts:
            continue  # links in a checkout, copies in an installed package
        checksum.update(str(name).encode())
        checksum.update(path.read_bytes())
    return checksum.hexdigest()[:12]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for name in COMPARED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return versions


def _check_device(device: torch.device) -> None:
    """Check a device by multiplying two matrices of small integers, whose product is exact in any order of summation.
    Raises: UserError."""
    numbers = torch.arange(PRODUCT * PRODUCT).view(PRODUCT, PRODUCT)
    a, b = numbers % 7 - 3, numbers.T % 5 - 2
    try:
        product = (a.float().to(device) @ b.float().to(device)).cpu()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{_device_name(device)} does not work ({first}): take it out of service") from error
    if not torch.equal(product, (a.double() @ b.double()).float()):
        raise UserError(f"{_device_name(device)} returned a wrong product: take it out of service")


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"


def _slowest(topology: Topology, group: Group) -> str:
    """Bus bandwidth of the slowest all-reduce in the groups of an axis, and its rank, as text. nccl-tests define bus
    bandwidth as 2 (n − 1) / n · bytes / seconds. Raises: UserError if an all-reduce fails, hangs or returns a wrong
    sum."""
    seconds = topology.exchange(topology.together(partial(_all_reduce_seconds, group, topology.device)))
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    speed = 2 * (group.size - 1) / group.size * ALL_REDUCE_BYTES / max(seconds)
    return f"{speed / 1e9:.2g} GB/s (slowest at {topology.where(slowest)})"


def _all_reduce_seconds(group: Group, device: torch.device) -> float:
    """The duration in seconds of the fastest of three all-reduces. Raises: UserError."""
    seconds = []
    for _ in range(3):
        tensor = torch.full((ALL_REDUCE_BYTES // 4,), float(group.rank + 1), device=device)
        started = time.perf_counter()
        try:
            work = dist.all_reduce(tensor, group=group.handle, async_op=True)
            work.wait(ALL_REDUCE_TIMEOUT)
            answer = tensor.aminmax()
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            raise UserError(
                f"an all-reduce with {group.size - 1} other ranks failed ({first}): check the network between the "
                "hosts, and the network interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            ) from error
        seconds.append(time.perf_counter() - started)
        right = group.size * (group.size + 1) / 2
        if float(answer.min) != right or float(answer.max) != right:
            raise UserError(f"an all-reduce of {group.size} ranks returned a wrong sum: check devices and network")
    return min(seconds)


def _is_first_on_host(topology: Topology) -> bool:
    """Whether this rank is the lowest rank on its host."""
    rank = topology.world.rank
    return topology.hosts.index(topology.hosts[rank]) == rank


def _check_shared_folder(folder: Path, topology: Topology) -> None:
    """Check that every rank sees a file that rank 0 creates in `run.dir`, since all ranks write a checkpoint to this
    folder."""
    probe = folder / f".preflight-{topology.exchange(f'{time.time_ns()}-{os.getpid()}')[0]}"

    def touch() -> None:
        if topology.is_main:
            _in_run_folder(probe.touch, folder)

    def look() -> None:
        if not probe.exists():
            raise UserError(
                f"run.dir={folder} is not the folder that {topology.where(0)} writes to: choose a folder that all "
                "hosts share"
            )

    topology.together(touch)
    try:
        topology.together(look)
    finally:
        if topology.is_main:
            remove(probe)


def _in_run_folder(work: Callable[[], Any], folder: Path) -> Any:
    """Call `work`, which uses the run's folder, and return its result. Raises: UserError instead of an OSError."""
    try:
        return work()
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be written ({error.strerror}): choose another folder") from error


def _check_disk(run: Run) -> str:
    """Check that the disk has room for all checkpoints that exist at the same time. Returns the free and needed space
    as text."""
    labels = Labels.numbered(2) if run.task.name.classifies else None
    parameters = sum(map(math.prod, trained_shapes(network(run.model, run.task.lora, labels, ALONE)).values()))
    size = kind_of(run.optimizer).checkpoint_bytes * parameters
    saves = -(-run.stop // run.checkpoint.every) if run.checkpoint.every else 1
    folder = run.folder / "checkpoints"  # the user may have linked this folder to a larger disk
    more = max(min(run.checkpoint.keep + 1, saves) - len(steps_in(folder)), 1)
    free = _in_run_folder(partial(shutil.disk_usage, folder if folder.exists() else run.folder), run.folder).free
    needed = f"{more} checkpoint{'s' * (more > 1)} of {bytes_in_words(size)}"
    if free < more * size:
        raise UserError(
            f"run.dir={run.folder} has {bytes_in_words(free)} free, but {needed} will exist "
            f"at the same time (checkpoint.keep={run.checkpoint.keep}, and the one being written): free space, choose "
            "another run.dir, or lower checkpoint.keep"
        )
    return f"{bytes_in_words(free)} free for {needed}"


def _check_data(data: DataConfig, topology: Topology) -> None:
    """Check that every host has the same data files, by comparing all sizes and the first and last bytes of some
    files."""
    paths = topology.together(lambda: [path for corpus in corpora(data) for path in corpus.every_file])
    files = topology.together(lambda: _files(paths) if _is_first_on_host(topology) else None)
    first_ranks = [topology.hosts.index(host) for host in dict.fromkeys(topology.hosts)]
    checksum = files and crc32(repr(files).encode())
    checksums = topology.exchange(checksum)
    if all(checksums[rank] == checksums[0] for rank in first_ranks):
        return
    lists = [each or {} for each in topology.exchange(files)]
    for rank in first_ranks:
        for path in sorted(lists[0].keys() | lists[rank].keys()):
            here, there = lists[0].get(path), lists[rank].get(path)
            if here != there:
                what = f"lacks {path}, unlike" if there is None else f"has another {path} than"
                raise UserError(
                    f"{topology.where(rank)} {what} {topology.where(0)}: copy the same text to every "
                    "host, or choose files that all hosts share",
                    shared=True,
                )


def _files(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """The size of each file and, for some files, a checksum of the first and last bytes. The keys of the dictionary are
    paths relative to the working directory."""
    here = Path.cwd()
    names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths]
    try:
        return dict(zip(names, ends_of(paths), strict=True))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): replace it or leave it out") from error


def _warn_of_clocks(topology: Topology) -> float:
    """Warn of hosts whose clocks differ from rank 0's clock. Returns the largest difference between two clocks in
    seconds."""
    topology.barrier()
    times = topology.exchange(time.time())
    for rank, theirs in enumerate(times):
        apart = theirs - times[0]
        if abs(apart) > SKEW and topology.hosts.index(topology.hosts[rank]) == rank:
            say(
                f"warning: the clock of {topology.where(rank)} is {abs(apart):,.0f} s "
                f"{'ahead of' if apart > 0 else 'behind'} that of {topology.where(0)}: synchronise the clocks"
            )
    return max(times) - min(times)


def _grid(topology: Topology) -> list[str]:
    """Lines of text that show the ranks of each host in the data × tensor grid."""
    if topology.world.size == 1:
        return []
    tensor, lines = topology.tensor.size, []
    for host in dict.fromkeys(topology.hosts):
        ranks = topology.ranks_on(host)
        data, columns = {rank // tensor for rank in ranks}, {rank % tensor for rank in ranks}
        lines.append([f"  {host}", f"ranks {_span(ranks)}", f"data {_span(data)}", f"tensor {_span(columns)}"])
    return aligned(lines).split("\n")


def _span(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    if len(ordered) > 1 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}–{ordered[-1]}"
    return ", ".join(map(str, ordered))
