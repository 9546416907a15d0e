"""What the launchers of the attention kernels share: layouts, scalars, and the extents of padded sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertkd.kernels.primitives import EXTENTS, sequence_extents
from bertkd.ops.shared import found_once
from bertkd.ops.triton import interpreting
from bertkd.ops.triton.sizes import power_of_2

LOG2E = math.log2(math.e)
MAX_WIDTH = 128
# Largest length whose unnormalised sums a float16 holds.
HALF_LIMIT = 65504


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels of ``op`` cannot run on ``tensors`` (B, H, L, D), or None."""
    width = max(t.shape[-1] for t in tensors)
    if width > MAX_WIDTH:
        return f"its kernels hold head widths up to {MAX_WIDTH}, got {width}"
    if tensors[0].dtype == torch.float16 and tensors[0].shape[-2] > HALF_LIMIT:
        return f"sums over more than {HALF_LIMIT} keys do not fit in float16"
    return None


def padded(width: int) -> int:
    """Head width in a kernel: a power of two, at least the 16 that a matrix instruction needs."""
    return max(16, power_of_2(width))


def block_length(length: int) -> int:
    """Length of the tile that holds a whole short sequence."""
    return max(16, power_of_2(length))


# Two tensors of the student and two of the teacher, (B, H, L, D) each.
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


class Shape(NamedTuple):
    """Sizes and compile-time arguments of a pair of sides."""

    batch: int
    heads: int
    length: int
    constants: dict[str, Any]


def shape_of(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Shape:
    """Sizes of the sides and the constants every attention kernel takes.

    Products of 16-bit operands are exact in fp32; a side with an fp32 operand, or two dtypes, multiplies in fp32.
    """
    batch, heads, length, width_s = student[0].shape
    width_t = teacher[0].shape[-1]
    bf16 = any(x.dtype == torch.bfloat16 for x in (*student, *teacher))
    constants = {
        "D_S": width_s,
        "D_T": width_t,
        "PAD_S": padded(width_s),
        "PAD_T": padded(width_t),
        "FP32_S": _is_fp32(student),
        "FP32_T": _is_fp32(teacher),
        "UPCAST": bf16 and interpreting(),
    }
    return Shape(batch, heads, length, constants)


def _is_fp32(side: Sequence[Tensor]) -> bool:
    return len({x.dtype for x in side}) > 1 or side[0].dtype == torch.float32


def mask_arguments(mask: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int, int]:
    """Pointer and strides of a mask; ``stand_in`` is a pointer that is not read."""
    if mask is None:
        return stand_in, 0, 0
    # Triton has no pointers to single bits: a bool is read as the byte it is.
    return mask.view(torch.uint8), mask.stride(0), mask.stride(1)


class Extents(NamedTuple):
    """Per sequence, on the device: ``table`` (B, EXTENTS) int32 and ``peak`` (B,) fp32, unwritten without weights."""

    table: Tensor
    peak: Tensor


def extents_of(mask: Tensor | None, weight: Tensor | None, x: Tensor) -> Extents:
    """Where keys and rows of every sequence begin and end, and the largest |weight|, on the device.

    Args:
        mask: (B, L) bool, or None if all keys are real.
        weight: (B, H, L), or None if all rows are wanted.
        x: (B, H, L, D), for its sizes.
    """
    return found_once(_extents, mask, weight, x)


def _extents(mask: Tensor | None, weight: Tensor | None, x: Tensor) -> Extents:
    batch, _, length, _ = x.shape
    extents = torch.empty((batch, EXTENTS.value), dtype=torch.int32, device=x.device)
    peak = torch.empty((batch,), dtype=torch.float32, device=x.device)
    bits, mask_b, mask_l = mask_arguments(mask, extents)
    strides = (0, 0, 0) if weight is None else weight.stride()
    sequence_extents[(batch,)](
        bits,
        peak if weight is None else weight,
        extents,
        peak,
        mask_b,
        mask_l,
        *strides,
        # A weight that was expanded over the heads needs to be looked at once.
        1 if weight is None or strides[1] == 0 else weight.shape[1],
        length,
        HAS_MASK=mask is not None,
        HAS_WEIGHT=weight is not None,
        BLOCK=min(1024, max(16, power_of_2(length))),
        enable_fp_fusion=True,
    )
    return Extents(extents, peak)
