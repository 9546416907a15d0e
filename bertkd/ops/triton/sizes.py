"""How many: arithmetic of every launcher, and the programs that a GPU runs at once."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own takes microseconds where it runs on the host too."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not less than ``n``; quick, as ``cdiv``."""
    return 1 << (n - 1).bit_length()


def resident_programs(work: int, num_warps: int, x: Tensor) -> int:
    """Programs that share ``work`` pieces: as many as fit on the GPU at once with all the registers that they want.

    Eight warps of 255 registers a thread fill a multiprocessor.
    """
    at_once = max(1, 8 // num_warps) * _multiprocessors(x.device) if x.is_cuda else 2
    return min(work, at_once)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
