"""What every rank shows before the first step, within seconds: that all run the same, on what works.

A mistake is said in one line that names host and rank, and every rank ends with it; a device or a network that hangs is
waited for no longer than a minute.
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
from opt_parallel.config.model import Labels
from opt_parallel.config.paths import make_folder
from opt_parallel.config.run import Run
from opt_parallel.data.prepare import corpora
from opt_parallel.data.store.sameness import ends_of
from opt_parallel.model.build import network
from opt_parallel.optim import OPTIMIZERS
from opt_parallel.parallel.shard import trained_shapes
from opt_parallel.parallel.topology import ALONE, DEVICE_PATIENCE, Group, Topology
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import aligned, bytes_in_words, say
from opt_parallel.storage.atomic import remove

PATIENCE = timedelta(seconds=20)
COMPARED = (
    "torch", "deepspeed", "numpy", "tokenizers", "datasets", "pyarrow", "safetensors", "accelerate", "hydra-core",
    "omegaconf",
)  # fmt: skip
PRODUCT = 512  # the matrices multiplied to see whether a device is alive
ALL_REDUCE_BYTES = 8_000_000
SKEW = 5.0  # seconds between two hosts' clocks that are worth a warning


def check_same(run: Run, topology: Topology) -> None:
    """Before any rank works with another: they run the same code with the same libraries and settings.

    Raises: UserError, on every rank, that names the first that differs from rank 0, and in what."""
    own = {"code": {"opt-parallel": code_checksum()}, "libraries": _versions(), "settings": to_dict(run)}
    told = topology.exchange(own)
    ways_out = {
        "code": "bring the same version to every host",
        "libraries": "install the same versions on every host",
        "settings": "start every rank with the same command line, and the same configs",
    }
    for rank, theirs in enumerate(told):
        for part, way_out in ways_out.items():
            rows = changes(told[0][part], theirs[part])
            if rows:
                named = ", ".join(f"{key} {there} instead of {here}" for key, here, there in rows[:3])
                more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
                raise UserError(
                    f"{topology.where(rank)} has other {part} than {topology.where(0)}: {named}{more}; {way_out}",
                    shared=True,
                )


def preflight(run: Run, topology: Topology) -> list[str]:
    """Check the rest, in the order in which one failure would explain the next; what was found, in a few lines.

    Raises: UserError, on every rank."""
    began = time.perf_counter()
    topology.together(partial(_check_device, topology.device), DEVICE_PATIENCE)
    speeds = [
        f"{name} {_slowest(topology, group)}"
        for name, group in (("tensor", topology.tensor), ("data", topology.data))
        if group.size > 1
    ]
    _check_shared_folder(run, topology)
    room = topology.together(lambda: _check_room(run) if _speaks_for_host(topology) else "")
    _check_data(run, topology)
    skew = _warn_of_clocks(topology)
    hosts = len(set(topology.hosts))
    same = f"same code, libraries, settings and data on {topology.world.size} ranks, {hosts} host{'s' * (hosts > 1)}; "
    return [
        f"preflight: {same if topology.world.size > 1 else ''}{_device_name(topology.device)} multiplies right; "
        + (f"all-reduce of {bytes_in_words(ALL_REDUCE_BYTES)}: {', '.join(speeds)}; " if speeds else "")
        + room
        + (f"; clocks within {skew:.1f} s" if hosts > 1 else "")
        + f"; {time.perf_counter() - began:.1f} s",
        *_grid(topology),
    ]


def make_run_folder(run: Run) -> None:
    """Make the run's folder. Raises: UserError if it cannot be written."""
    make_folder("run.dir=", run.folder)


def code_checksum() -> str:
    """A checksum of the package's source, as it lies on this host."""
    package, checksum = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        checksum.update(str(path.relative_to(package)).encode())
        checksum.update(path.read_bytes())
    return checksum.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for name in COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _check_device(device: torch.device) -> None:
    """A product of matrices of small whole numbers, which is exact in any order of summation."""
    numbers = torch.arange(PRODUCT * PRODUCT).view(PRODUCT, PRODUCT)
    a, b = numbers % 7 - 3, numbers.T % 5 - 2
    try:
        product = (a.float().to(device) @ b.float().to(device)).cpu()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{_device_name(device)} does not work ({first}): take it out of service") from error
    if not torch.equal(product, (a.double() @ b.double()).float()):
        raise UserError(f"{_device_name(device)} multiplies wrongly: take it out of service")


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"


def _slowest(topology: Topology, group: Group) -> str:
    """The slowest all-reduce of the groups along an axis, and where: bus bandwidth as NCCL's tests count it,
    2 (n − 1) / n · bytes / seconds. Raises: UserError if one does not end or adds wrongly."""
    told = topology.exchange(topology.together(partial(_all_reduce_seconds, group, topology.device)))
    slowest = max(range(len(told)), key=told.__getitem__)
    speed = 2 * (group.size - 1) / group.size * ALL_REDUCE_BYTES / max(told)
    return f"{speed / 1e9:.2g} GB/s (slowest at {topology.where(slowest)})"


def _all_reduce_seconds(group: Group, device: torch.device) -> float:
    """The quickest of three."""
    seconds = []
    for _ in range(3):
        tensor = torch.full((ALL_REDUCE_BYTES // 4,), float(group.rank + 1), device=device)
        began = time.perf_counter()
        try:
            work = dist.all_reduce(tensor, group=group.handle, async_op=True)
            work.wait(PATIENCE)
            answer = tensor.aminmax()
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            raise UserError(
                f"an all-reduce with {group.size - 1} other ranks failed ({first}): check the network between the "
                "hosts, and which interface is taken (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            ) from error
        seconds.append(time.perf_counter() - began)
        right = group.size * (group.size + 1) / 2
        if float(answer.min) != right or float(answer.max) != right:
            raise UserError(f"an all-reduce of {group.size} ranks adds wrongly: check the devices and the network")
    return min(seconds)


def _speaks_for_host(topology: Topology) -> bool:
    rank = topology.world.rank
    return topology.hosts.index(topology.hosts[rank]) == rank


def _check_shared_folder(run: Run, topology: Topology) -> None:
    """Every rank must see in `run.dir` what rank 0 puts there: a checkpoint is written by all of them."""
    probe = run.folder / f".preflight-{topology.exchange(f'{time.time_ns()}-{os.getpid()}')[0]}"

    def touch() -> None:
        if topology.is_main:
            _said(probe.touch, run)

    def look() -> None:
        if not probe.exists():
            raise UserError(
                f"run.dir={run.folder} is not the folder that {topology.where(0)} writes to: choose one that all "
                "hosts share"
            )

    topology.together(touch)
    try:
        topology.together(look)
    finally:
        if topology.is_main:
            remove(probe)


def _said(work: Callable[[], Any], run: Run) -> Any:
    """What `work` in the run's folder returns; the system's refusal as a mistake's line."""
    try:
        return work()
    except OSError as error:
        raise UserError(f"run.dir={run.folder} cannot be written ({error.strerror}): choose another folder") from error


def _check_room(run: Run) -> str:
    """Whether the checkpoints that will be there at once have room."""
    labels = Labels.numbered(2) if run.task.name.classifies else None
    parameters = sum(map(math.prod, trained_shapes(network(run, labels, ALONE)).values()))
    size = OPTIMIZERS[run.optimizer.name].checkpoint_bytes * parameters
    saves = -(-run.stop // run.checkpoint.every) if run.checkpoint.every else 1
    folder = run.folder / "checkpoints"  # which may be a link to a larger disk
    more = max(min(run.checkpoint.keep + 1, saves) - len(steps_in(folder)), 1)
    free = _said(partial(shutil.disk_usage, folder if folder.exists() else run.folder), run).free
    needed = f"{more} checkpoint{'s' * (more > 1)} of {bytes_in_words(size)}"
    if free < more * size:
        raise UserError(
            f"run.dir={run.folder} has {bytes_in_words(free)} free for checkpoints, and {needed} must have room at "
            f"once (checkpoint.keep={run.checkpoint.keep}, and the one that is written): make room, choose another "
            "run.dir, or lower checkpoint.keep"
        )
    return f"{bytes_in_words(free)} free for {needed}"


def _check_data(run: Run, topology: Topology) -> None:
    """The same files on every host: all sizes, and of some the first and last bytes."""
    paths = topology.together(lambda: [path for corpus in corpora(run) for path in corpus.files])
    files = topology.together(lambda: _files(paths) if _speaks_for_host(topology) else None)
    speakers = [topology.hosts.index(host) for host in dict.fromkeys(topology.hosts)]
    checksum = files and crc32(repr(files).encode())
    told = topology.exchange(checksum)
    if all(told[rank] == told[0] for rank in speakers):
        return
    lists = [each or {} for each in topology.exchange(files)]
    for rank in speakers:
        for path in sorted(lists[0].keys() | lists[rank].keys()):
            here, there = lists[0].get(path), lists[rank].get(path)
            if here != there:
                what = "has no" if there is None else "has another"
                raise UserError(
                    f"{topology.where(rank)} {what} {path} than {topology.where(0)}: bring the same text to every "
                    "host, or choose files that all hosts share",
                    shared=True,
                )


def _files(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """Size of each file, by its name as seen from here, and the checksum of a few bytes of some."""
    here = Path.cwd()
    names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths]
    try:
        return dict(zip(names, ends_of(paths), strict=True))
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): bring a good copy or leave it out"
        ) from error


def _warn_of_clocks(topology: Topology) -> float:
    """Seconds between the earliest and the latest clock."""
    topology.barrier()
    told = topology.exchange(time.time())
    for rank, theirs in enumerate(told):
        apart = theirs - told[0]
        if abs(apart) > SKEW and topology.hosts.index(topology.hosts[rank]) == rank:
            say(
                f"warning: the clock of {topology.where(rank)} is {abs(apart):,.0f} s "
                f"{'ahead of' if apart > 0 else 'behind'} that of {topology.where(0)}: times in logs will mislead"
            )
    return max(told) - min(told)


def _grid(topology: Topology) -> list[str]:
    """Which host holds which part of data × tensor."""
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
