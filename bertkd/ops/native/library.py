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
    _why = _build.missing("cpu")
    _reason = (
        f"bertkd._C is not built: {_why}" if _why else f"bertkd._C is missing: {_build.lost()}"
    )
except ImportError as error:
    _reason = f"bertkd._C cannot be loaded: {error}"


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


# glibc hands blocks of this size back as they are freed, so their pages are fresh in every call.
LARGE = 32 << 20


def in_large_pages(x: Tensor) -> Tensor:
    """``x``, just allocated and not written yet, in pages of 2 MiB where it is large and the system has them.

    The system clears each page as it is first written; one of 4 KiB at a time, that is longer than
    ``softmax_kl`` itself takes.
    """
    storage = x.untyped_storage()
    if storage.nbytes() >= LARGE:
        kernels().use_large_pages(storage.data_ptr(), storage.nbytes())
    return x


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient laid out like ``x``, and where to write it: itself, or a copy with contiguous rows."""
    grad = in_large_pages(torch.empty_like(x))
    dense = grad.stride(-1) == 1 or grad.shape[-1] == 1
    return grad, grad if dense else in_large_pages(torch.empty(x.shape, dtype=x.dtype))
