"""A CUDA device that computes nothing, on which a CPU build of torch traces forward and backward passes.

A fake tensor has a device, a shape and a dtype, but no values, so a network of any size can be traced. The autograd
engine asks the device of a tensor for its streams. In a CPU build of torch, no code answers for CUDA devices. The
library `fake_cuda.cpp` answers. Loading it cannot be undone, so it belongs in a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import cpp_extension

from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICE = torch.device("cuda", 0)
LARGEST = 2**16  # ranks of the process group that the others are parts of


class NoFakeDevice(UserError):
    """Fake CUDA tensors are not available here. The message names what is missing."""


def cache() -> Path:
    """The folder of the compiled libraries, which are kept because compiling takes half a minute."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opt-parallel"


def load() -> None:
    """Give this process a CUDA device that computes nothing. Raises: NoFakeDevice, as `built` does."""
    ctypes.CDLL(str(built()))
    torch.cuda.default_generators = (torch.Generator(),)  # attention dropout seeds the device's generator
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = _Stream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment, return-value]


class _Stream:
    """A stream of the device, and an event, with the methods that the network calls."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self


def built() -> Path:
    """The compiled library, which is compiled at the first use.

    Raises: NoFakeDevice with a build of torch for CUDA, without a C++ compiler, or if the library does not compile."""
    if torch.version.cuda or torch.version.hip:
        raise NoFakeDevice(
            f"torch {torch.__version__} is built for GPUs, and fake CUDA tensors need a build for CPUs: run this "
            "command in an environment with such a build"
        )
    compiler = os.environ.get("CXX", "c++")
    words = [
        "-std=c++20", "-O1", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{folder}" for folder in cpp_extension.include_paths()),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    key = "\n".join([SOURCE.read_text(encoding="utf-8"), torch.__version__, compiler, *words])
    library = cache() / f"fake-cuda-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise NoFakeDevice(
            f"{compiler} was not found, and fake CUDA tensors need a C++ compiler: install g++, or set CXX"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    own = library.with_suffix(f".{os.getpid()}")
    done = subprocess.run([compiler, str(SOURCE), *words, "-o", str(own)], capture_output=True, text=True, check=False)
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NoFakeDevice(f"{compiler} cannot compile {SOURCE.name} for torch {torch.__version__}: {line}")
    own.replace(library)  # Atomic: several processes may compile at the same time.
    return library


def group_of(size: int, apart: int = 1) -> Group:
    """The first rank of a group of `size` ranks that do not exist, whose numbers are `apart` from each other.

    Collectives return at once, with tensors of the right shapes."""
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=LARGEST)
    return Group(dist.new_group(list(range(0, size * apart, apart))), 0, size)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """A context in which all new tensors are fake. Attention uses the kernels that torch selects on a GPU."""
    whole = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    try:
        with FakeTensorMode():
            yield
    finally:
        F.scaled_dot_product_attention = whole


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    if mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal)[0]
    bias = None
    if mask is not None:
        padded = -(-key.size(2) // 16) * 16  # the kernel needs aligned rows
        bias = torch.zeros(*mask.shape[:-1], padded, dtype=query.dtype, device=query.device)[..., : key.size(2)]
        bias = bias.masked_fill(~mask, float("-inf")).expand(query.size(0), query.size(1), -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, dropout, causal)[0]
