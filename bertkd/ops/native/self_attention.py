"""Launchers of self_attention: allocate, pass addresses, no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.native.library import in_large_pages, kernels
from bertkd.ops.tensors import heads, key_mask, unit_stride


def empty_heads(like: Tensor) -> Tensor:
    """A tensor (B, H, L, D) in the memory order (B, L, H, D): what the layer around attention reads and writes."""
    b, h, length, d = like.shape
    return like.new_empty(b, length, h, d).transpose(1, 2)


def empty_stats(q: Tensor) -> Tensor:
    """Two numbers for every row."""
    return q.new_empty(*q.shape[:-1], 2, dtype=torch.float32)


def self_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    window: int = -1,
) -> tuple[Tensor, Tensor]:
    """Attention's output (B, H, L, D), and what the backward needs of its rows (B, H, L, 2)."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out, stats = in_large_pages(empty_heads(q)), empty_stats(q)
    if q.numel():
        mask = None if mask is None else mask.bool()
        kernels().self_attention_fwd(
            tuple(q.shape[:-1]),
            *map(heads, (q, k, v)),
            key_mask(mask),
            scale,
            dropout,
            0 if seed is None else seed.item(),
            heads(out),
            stats.data_ptr(),
            torch.get_num_threads(),
            window,
        )
    return out, stats


def self_attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    window: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from what the forward returned."""
    grads = empty_heads(q), empty_heads(k), empty_heads(v)
    for grad in grads:
        in_large_pages(grad)
    if q.numel():
        grad_out, q, k, v, out = (unit_stride(x) for x in (grad_out, q, k, v, out))
        # A hook on saved tensors may have laid it out anew.
        stats = stats.contiguous()
        mask = None if mask is None else mask.bool()
        kernels().self_attention_bwd(
            tuple(q.shape[:-1]),
            *map(heads, (grad_out, q, k, v)),
            key_mask(mask),
            scale,
            dropout,
            0 if seed is None else seed.item(),
            heads(out),
            stats.data_ptr(),
            *map(heads, grads),
            torch.get_num_threads(),
            window,
        )
    return grads
