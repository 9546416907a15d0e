"""Launchers of relation_kl and self_relation_kl: allocate, pass addresses and the current stream, no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.cuda.library import kernels, launch, workspace
from bertkd.ops.tensors import guard, heads, key_mask


def _rows(op, a_s, b_s, a_t, b_t, mask, scale_s, scale_t) -> Tensor:
    if a_s.numel() == 0:
        return a_s.new_zeros(a_s.shape[:-1], dtype=torch.float32)
    mask = None if mask is None else mask.bool()
    with guard(a_s):
        out = torch.empty(a_s.shape[:-1], dtype=torch.float32, device=a_s.device)
        getattr(kernels(), f"{op}_rows")(
            tuple(a_s.shape[:-1]),
            *map(heads, (a_s, b_s, a_t, b_t)),
            key_mask(mask),
            scale_s,
            scale_t,
            out.data_ptr(),
            launch(workspace(a_s, 0)),
        )
    return out


def _fwd_bwd(
    op, row_weight, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, grads
) -> tuple[Tensor, ...]:
    if a_s.numel() == 0:
        # An empty tensor has no address.
        return a_s.new_zeros((), dtype=torch.float32), *grads
    mask = None if mask is None else mask.bool()
    with guard(a_s):
        loss = torch.empty((), dtype=torch.float32, device=a_s.device)
        work = workspace(a_s, kernels().relation_kl_workspace(*a_s.shape[:2]))
        getattr(kernels(), f"{op}_fwd_bwd")(
            tuple(a_s.shape[:-1]),
            (row_weight.data_ptr(), row_weight.stride()),
            *map(heads, (a_s, b_s, a_t, b_t)),
            key_mask(mask),
            scale_s,
            scale_t,
            loss.data_ptr(),
            heads(grads[0]),
            heads(grads[-1]),
            launch(work),
        )
    return loss, *grads


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
    grads = (torch.empty_like(a_s), torch.empty_like(b_s))
    args = (row_weight, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, grads)
    loss, grad_a, grad_b = _fwd_bwd("relation_kl", *args)
    return loss, grad_a, grad_b


def self_relation_kl_rows(
    x_s: Tensor, x_t: Tensor, mask: Tensor | None, scale_s: float, scale_t: float
) -> Tensor:
    """``relation_kl_rows`` with both roles played by one tensor a side, read once."""
    return _rows("self_relation_kl", x_s, x_s, x_t, x_t, mask, scale_s, scale_t)


def self_relation_kl_fwd_bwd(
    row_weight: Tensor,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradient with respect to x_s, through both roles."""
    grads = (torch.empty_like(x_s),)
    args = (row_weight, x_s, x_s, x_t, x_t, mask, scale_s, scale_t, grads)
    loss, grad = _fwd_bwd("self_relation_kl", *args)
    return loss, grad
