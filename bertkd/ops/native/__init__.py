"""The native implementation: the C++ kernels of ``csrc/cpu``, OpenMP over heads and rows, SIMD chosen at run time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bertkd.ops.native.attention import (
    attention_mse_fwd_bwd,
    attention_mse_rows,
    relation_kl_fwd_bwd,
    relation_kl_rows,
    self_relation_kl_fwd_bwd,
    self_relation_kl_rows,
    window_attention_mse_fwd_bwd,
    window_attention_mse_rows,
    window_relation_kl_fwd_bwd,
    window_relation_kl_rows,
)
from bertkd.ops.native.library import isa, unavailable
from bertkd.ops.native.linear_kl import linear_kl_fwd_bwd, linear_kl_rows
from bertkd.ops.native.rows import (
    hidden_mse_fwd_bwd,
    hidden_mse_sum,
    softmax_kl_fwd_bwd,
    softmax_kl_rows,
)
from bertkd.ops.tensors import DTYPES

_OPS = (
    "relation_kl",
    "self_relation_kl",
    "attention_mse",
    "window_relation_kl",
    "window_attention_mse",
    "hidden_mse",
    "softmax_kl",
    "linear_kl",
    "self_attention",
    "window_self_attention",
)


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the native kernels cannot run ``op`` on ``tensors``, or None."""
    if op not in _OPS:
        return f"there is no native kernel for {op}"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on CPUs, got a tensor on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"its kernels compute in float32 and take no {str(tensor.dtype).removeprefix('torch.')}"
    return None


__all__ = [
    "attention_mse_fwd_bwd",
    "attention_mse_rows",
    "hidden_mse_fwd_bwd",
    "hidden_mse_sum",
    "isa",
    "linear_kl_fwd_bwd",
    "linear_kl_rows",
    "refusal",
    "relation_kl_fwd_bwd",
    "relation_kl_rows",
    "self_relation_kl_fwd_bwd",
    "self_relation_kl_rows",
    "softmax_kl_fwd_bwd",
    "softmax_kl_rows",
    "unavailable",
    "window_attention_mse_fwd_bwd",
    "window_attention_mse_rows",
    "window_relation_kl_fwd_bwd",
    "window_relation_kl_rows",
]
