"""What every backend does with tensors: which count, the layouts that kernels want, what the C++ ones are told."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The codes of csrc/bertkd.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def float_tensors(inputs: Sequence[Any]) -> list[Tensor]:
    """The floating-point tensors among an op's arguments, lists of states included, in their order."""
    flat = [x for arg in inputs for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return [x for x in flat if isinstance(x, Tensor) and x.is_floating_point()]


def has_mask(inputs: Sequence[Any]) -> bool:
    """Whether a mask is among an op's arguments: the only tensor there that is no floating-point one."""
    return any(isinstance(x, Tensor) and not x.is_floating_point() for x in inputs)


def unit_stride(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not contiguous: kernels read rows as vectors."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def laid_out_like(given: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``given`` in its dtype and layout, ``grad`` itself where that already has both.

    The layout is that of ``torch.empty_like``: of a slice it has the order of the strides, not the gaps between them.
    """
    if grad.dtype == given.dtype and grad.stride() == given.stride():
        return grad
    wanted = torch.empty_like(given, device="meta")
    same = grad.dtype == wanted.dtype and grad.stride() == wanted.stride()
    return grad if same else torch.empty_like(given).copy_(grad)


def bias_gradient(sums: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """The gradient of a bias in its dtype; of an absent one, whose ``sums`` are empty, in the weight's."""
    return sums.to((weight if bias is None else bias).dtype)


def guard(x: Tensor) -> Any:
    """Makes the device of ``x`` the current one: a launch goes to the current device, not to its arguments'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def heads(x: Tensor) -> tuple[int, int, int, tuple[int, ...]]:
    """(B, H, L, D) as ``bertkd._C`` takes it: address, dtype, width, strides of the other dimensions."""
    return x.data_ptr(), DTYPES[x.dtype], x.shape[-1], x.stride()[:-1]


def key_mask(mask: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """A boolean (B, L) as ``bertkd._C`` takes it: address and strides."""
    return None if mask is None else (mask.data_ptr(), mask.stride())


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """(N, D) as ``bertkd._C`` takes it: address, dtype, width, stride of the rows."""
    return x.data_ptr(), DTYPES[x.dtype], x.shape[-1], x.stride(0)
