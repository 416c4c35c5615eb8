"""Finds the precisions that a device supports natively, and chooses one for `precision=auto`.

`auto` means bf16 if the devices of all ranks support bf16, else fp32. A device without instructions for a precision
emulates them. Emulation is several times slower than fp32, and on many CPUs a hundred times slower.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set

import torch

from opt_parallel.config.run import Precision
from opt_parallel.parallel.topology import Topology, local_device
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import CPUINFO, cpu_model

# A CPU supports a precision if it has one of these flags. The last flag of each set is of ARM, the others are of x86.
FLAGS = {Precision.bf16: {"avx512_bf16", "amx_bf16", "bf16"}, Precision.fp16: {"avx512_fp16", "amx_fp16", "asimdhp"}}
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN, torch's library for matrix products, uses no fp16 instructions. With
# all values except the last, oneDNN uses no bf16 instructions either.
ISAS = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni", "avx512_core_bf16")
WITHOUT = {Precision.bf16: ISAS[:-1], Precision.fp16: ISAS}


def cpu_flags(cpuinfo: str) -> set[str]:
    """The flags of the first CPU in the text of /proc/cpuinfo."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(line[1].split()) if line else set()


def native_on_cpu(flags: Set[str], environment: Mapping[str, str]) -> set[Precision]:
    """The precisions that a CPU with these flags supports, unless `environment` forbids oneDNN to use them."""
    limit = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA", "")
    supported = {each for each, needed in FLAGS.items() if needed & flags and limit.lower() not in WITHOUT[each]}
    return {Precision.fp32, *supported}


def native(device: torch.device) -> set[Precision]:
    """The precisions that `device` supports without emulation."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # compute capability 8.0 or more
        return {Precision.fp32, Precision.fp16} | ({Precision.bf16} if bf16 else set())
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    return native_on_cpu(cpu_flags(text), os.environ)


def choose_precision(
    asked: Precision, stage: int, topology: Topology, before: Precision | None = None
) -> tuple[Precision, str]:
    """`resolved` for the devices of all ranks. Every rank must call this function.

    `before` is the precision of the checkpoint that the run resumes from. Rank 0's value is used on all ranks."""
    answers = topology.exchange((native(topology.device), before))
    several = len(answers) > 1
    names = [
        device_name(topology.device) + (f" of {topology.where(rank)}" if several else "")
        for rank in range(len(answers))
    ]
    return resolved(asked, stage, [natives for natives, _ in answers], names, answers[0][1])


def choose_precision_alone(asked: Precision, stage: int) -> tuple[Precision, str]:
    """`resolved` for this process's device, before process groups exist."""
    return resolved(asked, stage, [native(local_device())], [device_name(local_device())])


def resolved(
    asked: Precision,
    stage: int,
    natives: Sequence[Set[Precision]],
    names: Sequence[str],
    before: Precision | None = None,
) -> tuple[Precision, str]:
    """The precision `asked`, or another in place of `auto`, and the reason for this choice as a text for users.

    The reason is empty if `asked` is not `auto`. A warning is printed if a device emulates the precision.

    Args:
        stage: the ZeRO stage.
        natives: the precisions that each rank's device supports natively.
        names: the name of each rank's device.
        before: the precision of the checkpoint that the run resumes from.
    """
    precision, why = asked, ""
    if asked is Precision.auto:
        precision, why = _chosen(stage, natives, names, before)
    if emulating := _emulating(precision, natives, names):
        say(f"warning: {emulating} emulates {precision.value}, many times slower than precision=fp32")
    return precision, why


def _chosen(
    stage: int, natives: Sequence[Set[Precision]], names: Sequence[str], before: Precision | None
) -> tuple[Precision, str]:
    if stage == 0:
        return Precision.fp32, "zero.stage=0 supports fp32 only"
    if before is not None:
        return before, "the checkpoint's"
    if emulating := _emulating(Precision.bf16, natives, names):
        return Precision.fp32, f"{emulating} would emulate bf16"
    return Precision.bf16, "the device supports it natively"


def _emulating(precision: Precision, natives: Sequence[Set[Precision]], names: Sequence[str]) -> str:
    """The name of the first device that does not support `precision`, or an empty string."""
    return next((name for name, each in zip(names, natives, strict=True) if precision not in each), "")


def device_name(device: torch.device) -> str:
    """The name of `device` in messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def device_model(device: torch.device) -> str:
    """The model of `device`, on which the rounding of results depends."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
