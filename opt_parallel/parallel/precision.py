"""In which precisions a device multiplies, and what `precision=auto` means: bf16 where every rank's device does, else
fp32.

A device that lacks instructions for a precision emulates it, which takes several times as long as fp32, on many CPUs a
hundred times.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch

from opt_parallel.config.run import Precision, Run
from opt_parallel.parallel.topology import Topology, local_device
from opt_parallel.runtime.log import say

CPUINFO = Path("/proc/cpuinfo")
# A CPU multiplies in these with one of the flags; the last is ARM's, the others are x86's
FLAGS = {Precision.bf16: {"avx512_bf16", "amx_bf16", "bf16"}, Precision.fp16: {"avx512_fp16", "amx_fp16", "asimdhp"}}
# What a user can hold oneDNN to, torch's library of products, that is without instructions for fp16; all but the last
# are without those for bf16, too
ISAS = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni", "avx512_core_bf16")
WITHOUT = {Precision.bf16: ISAS[:-1], Precision.fp16: ISAS}


def cpu_flags(cpuinfo: str) -> set[str]:
    """What the first CPU of /proc/cpuinfo can do, in Linux' words."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(line[1].split()) if line else set()


def native_on_cpu(flags: Set[str], environment: Mapping[str, str]) -> set[Precision]:
    """The precisions in which a CPU with these flags multiplies, as far as `environment` lets oneDNN use them."""
    held_to = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA", "")
    able = {each for each, needed in FLAGS.items() if needed & flags and held_to.lower() not in WITHOUT[each]}
    return {Precision.fp32, *able}


def native(device: torch.device) -> set[Precision]:
    """The precisions in which `device` multiplies rather than emulates them."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # from compute capability 8.0 on
        return {Precision.fp32, Precision.fp16} | ({Precision.bf16} if bf16 else set())
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    return native_on_cpu(cpu_flags(text), os.environ)


def settle(run: Run, topology: Topology, before: Precision | None = None) -> tuple[Run, str]:
    """`resolved` for the devices of all ranks, which take part together. `before`: of the checkpoint that the run goes
    on from, as rank 0 sees it."""
    told = topology.exchange((native(topology.device), before))
    ranks = range(len(told))
    names = [device_name(topology.device) + (f" of {topology.where(rank)}" if len(told) > 1 else "") for rank in ranks]
    return resolved(run, [each for each, _ in told], names, told[0][1])


def settle_alone(run: Run) -> tuple[Run, str]:
    """`resolved` for this process's device, where no group exists yet."""
    return resolved(run, [native(local_device())], [device_name(local_device())])


def resolved(
    run: Run, natives: Sequence[Set[Precision]], names: Sequence[str], before: Precision | None = None
) -> tuple[Run, str]:
    """`run` with one of the three precisions; and, if it was left open, why it is that one, for people.

    `natives`, `names`: of each rank's device, in which it multiplies, and what to call it. `before`: of the checkpoint
    that the run goes on from. Says a warning if a device emulates the precision."""
    precision, why = run.precision.name, ""
    if precision is Precision.auto:
        precision, why = _chosen(run, natives, names, before)
        run = dataclasses.replace(run, precision=dataclasses.replace(run.precision, name=precision))
    if emulating := _emulating(precision, natives, names):
        say(f"warning: {emulating} emulates {precision.value}, many times slower than precision=fp32")
    return run, why


def _chosen(
    run: Run, natives: Sequence[Set[Precision]], names: Sequence[str], before: Precision | None
) -> tuple[Precision, str]:
    if run.zero.stage == 0:
        return Precision.fp32, "zero.stage=0 takes no other"
    if before is not None:
        return before, "the checkpoint's"
    if emulating := _emulating(Precision.bf16, natives, names):
        return Precision.fp32, f"{emulating} would emulate bf16"
    return Precision.bf16, "the device multiplies it"


def _emulating(precision: Precision, natives: Sequence[Set[Precision]], names: Sequence[str]) -> str:
    """The first device that does not multiply in `precision`, nothing if all do."""
    return next((name for name, able in zip(names, natives, strict=True) if precision not in able), "")


def device_name(device: torch.device) -> str:
    """What to call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
