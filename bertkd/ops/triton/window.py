"""Launches the tile kernels of relation_kl and attention_mse where rows compare the keys of a window.

Neither a head in one program nor Gram matrices pay here: both would compute what a window leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.tensors import guard, laid_out_like
from bertkd.ops.triton.attention import extents_of, refusal
from bertkd.ops.triton.attention_mse import pairs_launch, unit_strides, usable_scales
from bertkd.ops.triton.relation_kl import positive_sides, rows_launch, tiled_launches

__all__ = [
    "refusal",
    "window_attention_mse_fwd_bwd",
    "window_attention_mse_rows",
    "window_relation_kl_fwd_bwd",
    "window_relation_kl_rows",
]


def window_relation_kl_rows(
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> Tensor:
    """KL of every query row over the keys at most ``window`` tokens away, (B, H, L)."""
    out = torch.empty(a_s.shape[:-1], dtype=torch.float32, device=a_s.device)
    if out.numel():
        sides = positive_sides(a_s, b_s, a_t, b_t, scale_s, scale_t)
        with guard(a_s):
            extents = extents_of(mask, None, a_s)
            scales = scale_s, scale_t
            rows_launch("rows", sides, mask, None, extents, out, *scales, window=window)
    return out


def window_relation_kl_fwd_bwd(
    row_weight: Tensor,
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` over windows and its gradients with respect to a_s and b_s, without atomics."""
    if row_weight.numel() == 0:
        return row_weight.sum(), torch.empty_like(a_s), torch.empty_like(b_s)
    sides = positive_sides(a_s, b_s, a_t, b_t, scale_s, scale_t)
    with guard(a_s):
        grads = torch.empty_like(sides[0]), torch.empty_like(sides[1])
        extents = extents_of(mask, row_weight, a_s)
        loss = tiled_launches(
            sides, mask, row_weight, extents, grads, scale_s, scale_t, window=window
        )
        return loss, laid_out_like(a_s, grads[0]), laid_out_like(b_s, grads[1])


def window_attention_mse_rows(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> Tensor:
    """Sum of (S_s - S_t)^2 of every query row over the real keys at most ``window`` tokens away, (B, H, L)."""
    out = torch.empty(q_s.shape[:-1], dtype=torch.float32, device=q_s.device)
    if out.numel():
        sides, scales = unit_strides(q_s, k_s, q_t, k_t), usable_scales(scale_s, scale_t)
        with guard(q_s):
            extents = extents_of(mask, None, q_s)
            pairs_launch(sides, mask, None, extents, out, None, *scales, keys=False, window=window)
    return out


def window_attention_mse_fwd_bwd(
    row_weight: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i sum_j (S_s - S_t)_ij^2`` over windows and its gradients with respect to q_s and k_s."""
    if row_weight.numel() == 0:
        return row_weight.sum(), torch.empty_like(q_s), torch.empty_like(k_s)
    sides, scales = unit_strides(q_s, k_s, q_t, k_t), usable_scales(scale_s, scale_t)
    with guard(q_s):
        extents = extents_of(mask, row_weight, q_s)
        grad_q, grad_k = torch.empty_like(sides[0]), torch.empty_like(sides[1])
        sums, _ = (
            pairs_launch(
                sides, mask, row_weight, extents, None, grad, *scales, keys=keys, window=window
            )
            for grad, keys in ((grad_q, False), (grad_k, True))
        )
        return sums.sum(), laid_out_like(q_s, grad_q), laid_out_like(k_s, grad_k)
