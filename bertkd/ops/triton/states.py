"""What the launchers on rows of states share: groups, layouts, dtypes, and products that sum in fp32."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from bertkd.ops.tensors import unit_stride

# Pointers are kernel arguments, of which there is room for 4 KiB.
TENSORS_PER_LAUNCH = 32


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of tensors that can share a launch: those of equal keys, and no more than fit."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    size = TENSORS_PER_LAUNCH
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def alignment(width: int, *tensors: Tensor | None) -> int:
    """Largest power of two up to 8 that divides a width and the row strides of tensors: what a load may vectorise."""
    return math.gcd(8, width, *(x.stride(0) for x in tensors if x is not None))


def one_layout(states: Sequence[Tensor]) -> list[Tensor]:
    """States (N, d) of one launch: one dtype, neighbouring components next to each other, one row stride."""
    dtype = operand_dtype(*states)
    used = [unit_stride(x.to(dtype)) for x in states]
    if len({x.stride(0) for x in used}) > 1:
        used = [x.contiguous() for x in used]
    return used


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype in which operands are multiplied: theirs if they agree, else fp32. The sums are fp32 anyway."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def aligned_size(size: int) -> int:
    """The largest multiple of 8 in a dimension, or all of a small one.

    Matrix products with a dimension like BERT's 30522 classes go to kernels of a third of the speed.
    """
    return size // 8 * 8 or size


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in fp32, from operands of one dtype, by the vendor's library."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    result = a.float() @ b.float()
    return result if out is None else out.copy_(result)


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums += a @ b`` in fp32, where the product has no memory of its own."""
    if a.dtype == torch.float32:
        torch.addmm(sums, a, b, out=sums)
    elif a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums += a.float() @ b.float()
