"""The Triton implementation: launchers that allocate, configure and launch the kernels of ``kernels/``.

Importing this package imports neither triton nor a kernel: an op's module is loaded on its first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Stem of an op -> the module that launches it.
_MODULES = {
    "relation_kl": "relation_kl",
    "self_relation_kl": "self_relation_kl",
    "attention_mse": "attention_mse",
    "window_relation_kl": "window",
    "window_attention_mse": "window",
    "hidden_mse": "hidden_mse",
    "hidden_proj_mse": "hidden_proj_mse",
    "hidden_combine_mse": "hidden_proj_mse",
    "hidden_cosine": "hidden_mse",
    "softmax_kl": "softmax_kl",
    "linear_kl": "linear_kl",
}


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable() -> str | None:
    """Why no Triton kernel can run in this installation, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not (torch.cuda.is_available() or interpreting()):
        return "it needs a CUDA device"
    return None


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the Triton kernels cannot run ``op`` on ``tensors``, or None.

    A launcher without a ``refusal`` of its own takes every width, layout and mix of dtypes.
    """
    if op not in _MODULES:
        return f"there is no Triton kernel for {op}"
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return "its kernels do not compute in float64"
        if not (tensor.is_cuda or (interpreting() and tensor.device.type == "cpu")):
            return f"it needs CUDA tensors, got one on {tensor.device}"
    own = getattr(_load(op), "refusal", None)
    return None if own is None else own(op, tensors)


def size_of_form(op: str, tensors: Sequence[Tensor]) -> int | None:
    """Length (of an op on states: rows) of a small case that takes the same form of the kernel as ``tensors``.

    None for ops whose forms `bertkd.ops.verify` tells apart by the length alone, or which have one.
    """
    own = getattr(_load(op), "size_of_form", None)
    return None if own is None else own(tensors)


@cache
def _load(op: str) -> Any:
    return importlib.import_module(f"{__name__}.{_MODULES[op]}")


def __getattr__(name: str) -> Any:
    op = next((op for op in _MODULES if name.startswith(f"{op}_")), None)
    if op is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_load(op), name)
