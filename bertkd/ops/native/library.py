"""The extension module ``bertkd._C``: whether it is there, and how tensors cross into it."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from bertkd import _build

_C: ModuleType | None = None
_reason: str | None = None
try:
    # torch is imported first: its OpenMP runtime is then the one that the extension finds loaded.
    _C = importlib.import_module("bertkd._C")
except ModuleNotFoundError:
    _reason = f"bertkd._C is not built: {_build.missing('cpu') or 'its file is gone'}"
except ImportError as error:
    _reason = f"bertkd._C cannot be loaded: {error}"

# The codes of csrc/bertkd.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable() -> str | None:
    """Why the native kernels cannot run in this installation, or None."""
    return _reason


def kernels() -> ModuleType:
    """``bertkd._C``.

    Raises:
        RuntimeError: if it is not there, with the reason.
    """
    if _C is None:
        raise RuntimeError(f"impl='native' cannot run: {_reason}. Use impl='chunked'.")
    return _C


def isa() -> str | None:
    """The instruction set the kernels use ("avx512", "avx2", "portable"), or None where they are not built."""
    return None if _C is None else _C.cpu_isa()


def unit_stride(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not contiguous: the kernels read rows as vectors."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def heads(x: Tensor) -> tuple[int, int, int, tuple[int, ...]]:
    """(B, H, L, D) as the kernels take it: address, dtype, width, strides of the other dimensions."""
    return x.data_ptr(), DTYPES[x.dtype], x.shape[-1], x.stride()[:-1]


def key_mask(mask: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """A boolean (B, L) as the kernels take it: address and strides."""
    return None if mask is None else (mask.data_ptr(), mask.stride())


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """(N, D) as the kernels take it: address, dtype, width, stride of the rows."""
    return x.data_ptr(), DTYPES[x.dtype], x.shape[-1], x.stride(0)


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient laid out like ``x``, and where to write it: itself, or a copy with contiguous rows."""
    grad = torch.empty_like(x)
    dense = grad.stride(-1) == 1 or grad.shape[-1] == 1
    return grad, grad if dense else torch.empty(x.shape, dtype=x.dtype)
