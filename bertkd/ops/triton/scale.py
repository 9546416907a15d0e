"""Launches the kernel that multiplies gradients in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertkd.kernels.scale import scale_kernel
from bertkd.ops.implementations import warn_once
from bertkd.ops.tensors import DTYPES, guard
from bertkd.ops.triton.sizes import cdiv, resident_programs
from bertkd.ops.triton.states import grouped

BLOCK = 4096


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


def scale_(xs: Sequence[Tensor], factor: Tensor) -> None:
    """``x *= factor`` for tensors that ``can_scale`` takes; ``factor`` has one element, on the same device."""
    for group in grouped([(x.dtype, x.numel()) for x in xs]):
        first = xs[group[0]]
        with guard(first):
            blocks = cdiv(first.numel(), BLOCK)
            # The tensors share the GPU: about 8 programs a multiprocessor among them, and one of each at least.
            programs = resident_programs(blocks, len(group), first)
            pointers = tuple(xs[index] for index in group)
            scale_kernel[(programs, len(group))](
                pointers,
                factor,
                first.numel(),
                blocks,
                BLOCK=BLOCK,
                enable_fp_fusion=True,
            )


_right: dict[tuple[torch.dtype, torch.device], bool] = {}


def is_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives on a device what PyTorch does: tried once in a process, and never in a graph capture."""
    if (dtype, device) not in _right:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _right[dtype, device] = _try(dtype, device)
    return _right[dtype, device]


def _try(dtype: torch.dtype, device: torch.device) -> bool:
    xs = [torch.linspace(-3.0, by, BLOCK + 5, device=device).to(dtype) for by in (1.0, 2.0)]
    for factor in (torch.tensor(by, device=device) for by in (1.0, 1 / 3)):
        want = [(x.float() * factor).to(dtype) for x in xs]
        got = [x.clone() for x in xs]
        try:
            scale_(got, factor)
        except Exception as error:
            # Whatever a compiler or driver raises, PyTorch can multiply.
            warn_once(
                f"bertkd scales gradients by PyTorch: its kernel raised {type(error).__name__}: {error}."
            )
            return False
        if not all(torch.equal(x, right) for x, right in zip(got, want, strict=True)):
            warn_once(
                f"bertkd scales gradients by PyTorch: its kernel is wrong in {dtype} on {device}."
            )
            return False
    return True
