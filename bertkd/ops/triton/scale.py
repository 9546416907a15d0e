"""Launches the kernel that multiplies a gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.kernels.scale import scale_kernel
from bertkd.ops.triton.attention import cdiv, guard, resident_programs

BLOCK = 4096
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_scale(x: Tensor, factor: Tensor) -> bool:
    """Whether the kernel can multiply ``x``: it fills its memory without gaps, in whatever order of its dimensions."""
    if x.dtype not in DTYPES or factor.device != x.device or factor.numel() != 1:
        return False
    strides = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """``x *= factor`` for tensors that ``can_scale`` takes; ``factor`` has one element, on the same device."""
    with guard(x):
        programs = resident_programs(cdiv(x.numel(), BLOCK), 1, x)
        scale_kernel[(programs,)](x, factor, x.numel(), BLOCK=BLOCK)
    return x
