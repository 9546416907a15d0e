"""Launchers of relations, attention_mse and both over windows: allocate, pass addresses, no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.native.library import empty_rows, kernels
from bertkd.ops.tensors import heads, key_mask, unit_stride

_NO_WINDOW = -1


def _rows(op, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window=_NO_WINDOW) -> Tensor:
    tensors = [unit_stride(x) for x in (a_s, b_s, a_t, b_t)]
    mask = None if mask is None else mask.bool()
    out = torch.empty(a_s.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out
    getattr(kernels(), f"{op}_rows")(
        tuple(a_s.shape[:-1]),
        *map(heads, tensors),
        key_mask(mask),
        scale_s,
        scale_t,
        out.data_ptr(),
        torch.get_num_threads(),
        window,
    )
    return out


def _fwd_bwd(
    op, row_weight, student, teacher, mask, scale_s, scale_t, window=_NO_WINDOW
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum, and the gradients of the distinct tensors of ``student`` (one or two)."""
    tensors = [unit_stride(x) for x in (*student, *teacher)]
    mask = None if mask is None else mask.bool()
    outputs = [empty_rows(x) for x in student]
    # A tensor without elements has no address.
    if row_weight.numel() == 0:
        return torch.zeros((), dtype=torch.float32), [grad for grad, _ in outputs]
    loss = torch.empty((), dtype=torch.float32)
    a_s, *_, b_t = tensors
    b_s, a_t = (a_s, b_t) if len(student) == 1 else tensors[1:3]
    getattr(kernels(), f"{op}_fwd_bwd")(
        tuple(a_s.shape[:-1]),
        (row_weight.data_ptr(), row_weight.stride()),
        *map(heads, (a_s, b_s, a_t, b_t)),
        key_mask(mask),
        scale_s,
        scale_t,
        loss.data_ptr(),
        heads(outputs[0][1]),
        heads(outputs[-1][1]),
        torch.get_num_threads(),
        window,
    )
    grads = [grad if grad is written else grad.copy_(written) for grad, written in outputs]
    return loss, grads


def relation_kl_rows(
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """KL of every query row, (B, H, L); rows of sequences without a real token are 0."""
    return _rows("relation_kl", a_s, b_s, a_t, b_t, mask, scale_s, scale_t)


def relation_kl_fwd_bwd(
    row_weight: Tensor,
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients with respect to a_s and b_s."""
    loss, grads = _fwd_bwd(
        "relation_kl", row_weight, (a_s, b_s), (a_t, b_t), mask, scale_s, scale_t
    )
    return loss, grads[0], grads[1]


def self_relation_kl_rows(
    x_s: Tensor, x_t: Tensor, mask: Tensor | None, scale_s: float, scale_t: float
) -> Tensor:
    """``relation_kl_rows`` with both roles played by one tensor a side, packed once."""
    return _rows("self_relation_kl", x_s, x_s, x_t, x_t, mask, scale_s, scale_t)


def self_relation_kl_fwd_bwd(
    row_weight: Tensor,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradient with respect to x_s, both roles summed before rounding."""
    loss, grads = _fwd_bwd("self_relation_kl", row_weight, (x_s,), (x_t,), mask, scale_s, scale_t)
    return loss, grads[0]


def attention_mse_rows(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """Sum over real keys of (S_s - S_t)^2 of every query row, (B, H, L)."""
    return _rows("attention_mse", q_s, k_s, q_t, k_t, mask, scale_s, scale_t)


def attention_mse_fwd_bwd(
    row_weight: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i sum_j (S_s - S_t)_ij^2`` and its gradients with respect to q_s and k_s."""
    loss, grads = _fwd_bwd(
        "attention_mse", row_weight, (q_s, k_s), (q_t, k_t), mask, scale_s, scale_t
    )
    return loss, grads[0], grads[1]


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
    """``relation_kl_rows`` over the keys that are at most ``window`` tokens away, O(L window)."""
    return _rows("relation_kl", a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window)


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
    """``relation_kl_fwd_bwd`` over the keys that are at most ``window`` tokens away."""
    loss, grads = _fwd_bwd(
        "relation_kl", row_weight, (a_s, b_s), (a_t, b_t), mask, scale_s, scale_t, window
    )
    return loss, grads[0], grads[1]


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
    """``attention_mse_rows`` over the keys that are at most ``window`` tokens away, O(L window)."""
    return _rows("attention_mse", q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window)


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
    """``attention_mse_fwd_bwd`` over the keys that are at most ``window`` tokens away."""
    loss, grads = _fwd_bwd(
        "attention_mse", row_weight, (q_s, k_s), (q_t, k_t), mask, scale_s, scale_t, window
    )
    return loss, grads[0], grads[1]
