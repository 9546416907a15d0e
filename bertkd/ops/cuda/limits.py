"""What the CUDA kernels cannot run, each in one clause. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bertkd import _build
from bertkd.ops.cuda.library import kernels
from bertkd.ops.tensors import DTYPES

# As in csrc/cuda/bertkd_cuda.h.
MAX_LENGTH, MIN_WIDTH, MAX_WIDTH = 128, 16, 128
MAX_BATCH = 65535


def device(tensors: Sequence[Tensor]) -> str | None:
    """Devices and dtypes: a GPU that the build has code for, and dtypes that it knows."""
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"it needs CUDA tensors, got one on {tensor.device}"
        if tensor.dtype not in DTYPES:
            name = str(tensor.dtype).removeprefix("torch.")
            return f"its kernels take float32, float16 and bfloat16, got {name}"
    return _unserved(tensors[0].device.index)


def rows(tensors: Sequence[Tensor]) -> str | None:
    """Matrices (N, D) of contiguous rows."""
    for tensor in tensors:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return "the rows of a tensor are not contiguous (call .contiguous() on it)"
        if tensor.shape[0] >= 1 << 31:
            return f"it takes fewer than 2^31 rows, got {tensor.shape[0]} (split them)"
    return None


def relation(tensors: Sequence[Tensor]) -> str | None:
    """(a_s, b_s, a_t, b_t) of (B, H, L, D)."""
    return _heads(tensors) or _shared(tensors[0], tensors[2], of_itself=False)


def self_relation(tensors: Sequence[Tensor]) -> str | None:
    """(x_s, x_t) of (B, H, L, D)."""
    return _heads(tensors) or _shared(tensors[0], tensors[1], of_itself=True)


def _heads(tensors: Sequence[Tensor]) -> str | None:
    first = tensors[0]
    if first.dtype == torch.float32:
        return "its tensor-core kernel takes float16 and bfloat16, not float32"
    if len({x.dtype for x in tensors}) > 1:
        return "student and teacher must have one dtype"
    batch, _, length, _ = first.shape
    if length > MAX_LENGTH:
        return f"a thread block holds up to {MAX_LENGTH} tokens, got {length}"
    if batch > MAX_BATCH:
        return f"it takes up to {MAX_BATCH} sequences, got {batch}"
    for tensor in tensors:
        width = tensor.shape[-1]
        if not (MIN_WIDTH <= width <= MAX_WIDTH and width % 8 == 0):
            return (
                f"head widths must be multiples of 8 from {MIN_WIDTH} to {MAX_WIDTH}, got {width}"
            )
        if tensor.stride(-1) != 1 or not _is_aligned(tensor):
            return (
                "the rows of a tensor do not start on 16-byte boundaries (call .contiguous() on it)"
            )
    return None


def _is_aligned(x: Tensor) -> bool:
    """Whether every row of a 16-bit tensor can be copied 16 bytes at a time."""
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return x.data_ptr() % 16 == 0 and all(size == 1 or step % 8 == 0 for size, step in strides)


def _shared(student: Tensor, teacher: Tensor, of_itself: bool) -> str | None:
    length, width_s, width_t = student.shape[2], student.shape[3], teacher.shape[3]
    needed = _shared_bytes(length, width_s, width_t, of_itself)
    available = _shared_limit(student.device.index)
    if needed > available:
        return (
            f"a head of {length} tokens and widths {width_s} and {width_t} needs {needed} bytes of shared "
            f"memory, this GPU has {available}"
        )
    return None


@lru_cache(maxsize=256)
def _shared_bytes(length: int, width_s: int, width_t: int, of_itself: bool) -> int:
    return kernels().relation_kl_shared_bytes(length, width_s, width_t, of_itself, True)


@lru_cache(maxsize=64)
def _shared_limit(index: int) -> int:
    return kernels().shared_limit(index)


@lru_cache(maxsize=64)
def _unserved(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if _build.serves(capability):
        return None
    number = f"{capability[0]}{capability[1]}"
    if capability < (8, 0):
        return f"its kernels need a GPU of sm_80 or newer, this one is sm_{number}"
    built = ", ".join(_build.record()["cuda_archs"])
    return (
        f"it was built for sm_{built}, this GPU is sm_{number} "
        f"(reinstall bertkd with BERTKD_CUDA_ARCHS={number})"
    )
