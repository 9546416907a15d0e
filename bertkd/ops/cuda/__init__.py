"""The CUDA C++ implementation (``csrc/cuda``): row kernels, and relation_kl with one thread block a head.

Opt-in: ``impl="auto"`` never picks it, since Triton's kernels are faster where both have been measured (docs/gpu.md).
It needs neither Triton nor a compiler at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bertkd.ops.cuda import limits
from bertkd.ops.cuda.library import unavailable
from bertkd.ops.cuda.relation_kl import (
    relation_kl_fwd_bwd,
    relation_kl_rows,
    self_relation_kl_fwd_bwd,
    self_relation_kl_rows,
)
from bertkd.ops.cuda.rows import (
    hidden_mse_fwd_bwd,
    hidden_mse_sum,
    softmax_kl_fwd_bwd,
    softmax_kl_rows,
)

_LIMITS = {
    "relation_kl": limits.relation,
    "self_relation_kl": limits.self_relation,
    "softmax_kl": limits.rows,
    "hidden_mse": limits.rows,
}


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the CUDA kernels cannot run ``op`` on ``tensors``, or None. Reads no device memory."""
    if op not in _LIMITS:
        return f"there is no CUDA kernel for {op}"
    return limits.device(tensors) or _LIMITS[op](tensors)


__all__ = [
    "hidden_mse_fwd_bwd",
    "hidden_mse_sum",
    "refusal",
    "relation_kl_fwd_bwd",
    "relation_kl_rows",
    "self_relation_kl_fwd_bwd",
    "self_relation_kl_rows",
    "softmax_kl_fwd_bwd",
    "softmax_kl_rows",
    "unavailable",
]
