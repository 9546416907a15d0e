"""What the launchers on rows of states share: layouts, gradients, and products that sum in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bertkd.ops.triton.attention import unit_stride


def alignment(width: int, *tensors: Tensor | None) -> int:
    """Largest power of two up to 8 that divides a width and the row strides of tensors: what a load may vectorise."""
    return math.gcd(8, width, *(x.stride(0) for x in tensors if x is not None))


def one_layout(states: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """States (N, d) of one launch: one dtype, neighbouring components next to each other, one row stride."""
    dtypes = {x.dtype for x in states}
    if dtype is None:
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    used = [unit_stride(x.to(dtype)) for x in states]
    if len({x.stride(0) for x in used}) > 1:
        used = [x.contiguous() for x in used]
    return used


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype in which operands are multiplied: theirs if they agree, else fp32. The sums are fp32 anyway."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in fp32, from operands of one dtype, by the vendor's library."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    result = a.float() @ b.float()
    return result if out is None else out.copy_(result)
