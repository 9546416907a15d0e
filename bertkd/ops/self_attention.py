"""Attention itself on CPUs, with dropout and without a map: for the networks around the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertkd.ops.autograd import first_order
from bertkd.ops.native import self_attention as native
from bertkd.ops.tensors import DTYPES

# A window of -1 is none; the default lets programs run that were exported before there were any.
_COMMON = "Tensor? mask, Tensor? seed, float scale, float dropout, int window=-1"
_QKV = "Tensor q, Tensor k, Tensor v"


def _fake_fwd(q, k, v, mask, seed, scale, dropout, window=-1):
    return native.empty_heads(q), native.empty_stats(q)


def _fake_bwd(grad_out, q, k, v, out, stats, mask, seed, scale, dropout, window=-1):
    return native.empty_heads(q), native.empty_heads(k), native.empty_heads(v)


for _name, _schema, _kernel, _fake in (
    (
        "self_attention_fwd",
        f"({_QKV}, {_COMMON}) -> (Tensor, Tensor)",
        native.self_attention_fwd,
        _fake_fwd,
    ),
    (
        "self_attention_bwd",
        f"(Tensor grad_out, {_QKV}, Tensor out, Tensor stats, {_COMMON}) -> (Tensor, Tensor, Tensor)",
        native.self_attention_bwd,
        _fake_bwd,
    ),
):
    torch.library.define(f"bertkd::{_name}", _schema)
    torch.library.impl(f"bertkd::{_name}", "CPU", _kernel)
    torch.library.register_fake(f"bertkd::{_name}", _fake)

_FORWARD = torch.ops.bertkd.self_attention_fwd.default
_BACKWARD = torch.ops.bertkd.self_attention_bwd.default


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, mask, seed, *options):
        out, stats = _FORWARD(q, k, v, mask, seed, *options)
        ctx.save_for_backward(q, k, v, out, stats, mask, seed)
        ctx.options = options
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out):
        grads = _BACKWARD(grad_out, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Attention of a sequence to itself on a CPU, in memory that grows with L also where there is dropout.

    The same as ``F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :], dropout, scale=scale)`` up to
    rounding, and up to which pairs are dropped: PyTorch's own kernel for CPUs knows no dropout and leaves it to
    code that builds the (B, H, L, L) maps. Sums are made in float32.

    Args:
        q, k, v: (B, H, L, D) on the CPU, float32, float16 or bfloat16, of one dtype and shape.
        mask: (B, L), true at the keys that may be attended to. A row without any is 0.
        scale: of the scores; ``D ** -0.5`` if None.
        dropout: probability with which a pair is dropped. The seed is drawn from PyTorch's default generator, so
            ``torch.manual_seed`` and checkpointing decide it.
        window: how many tokens to either side a row attends to; all by default. A row without a key there is 0. Work
            and memory are then O(L window).

    Returns:
        (B, H, L, D) in the inputs' dtype, in the memory order (B, L, H, D).

    Raises:
        RuntimeError: the native kernels are not built.
        ValueError: shapes, dtypes or devices do not fit, dropout is not in [0, 1), or window is negative.
    """
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or q.ndim != 4:
            raise ValueError(
                f"q and {name} must be (B, H, L, D) of one shape and dtype, got {tuple(q.shape)} {q.dtype} "
                f"and {tuple(x.shape)} {x.dtype}"
            )
    if q.dtype not in DTYPES or any(x.device.type != "cpu" for x in (q, k, v)):
        raise ValueError(
            "q, k and v must be float32, float16 or bfloat16 tensors on a CPU, got "
            f"{q.dtype} on {q.device}; use F.scaled_dot_product_attention"
        )
    keys = (q.shape[0], q.shape[2])
    if mask is not None and (mask.shape != keys or mask.device.type != "cpu"):
        raise ValueError(
            f"mask must be (B, L) = {keys} on the CPU, got {tuple(mask.shape)} on {mask.device}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if window is not None and window < 0:
        raise ValueError(f"window (tokens to either side) must be at least 0, got {window}")
    # A window that holds every sequence takes nothing away.
    width = window if window is not None and window < q.shape[2] - 1 else -1
    seed = torch.randint(-(2**63), 2**63 - 1, (), device="cpu") if dropout else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _SelfAttention.apply(q, k, v, mask, seed, scale, dropout, width)
