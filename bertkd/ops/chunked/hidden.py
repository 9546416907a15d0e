"""Hidden-state losses: blocks of rows, residual and gradient in one pass, no second copy of the states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bertkd.ops.chunked.softmax_kl import projected_blocks, row_blocks
from bertkd.ops.rows import weighted
from bertkd.ops.tensors import bias_gradient
from bertkd.reference import COSINE_EPS, compute_dtype, hidden_cosine_rows, hidden_mse_rows


def hidden_mse_fwd_bwd(
    row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``sum_k sum_i w_i |h_s[k]_i - h_t[k]_i|^2`` over states of (N, d), and its gradients."""
    dtype = compute_dtype(*h_s, *h_t)
    loss = torch.zeros((), dtype=dtype, device=row_weight.device)
    grads = []
    for student, teacher in zip(h_s, h_t, strict=True):
        grad = torch.empty_like(student)
        for block in row_blocks(student.shape[0], student.shape[1], student.device):
            weight = row_weight[block].to(dtype).unsqueeze(-1)
            residual = student[block].to(dtype) - teacher[block].to(dtype)
            residual.masked_fill_(weight == 0, 0.0)
            scaled = residual * weight
            loss += torch.dot(residual.flatten(), scaled.flatten())
            grad[block] = scaled.mul_(2)
        grads.append(grad)
    return loss, grads


def hidden_mse_sum(row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]) -> Tensor:
    """The same sum alone."""
    loss = row_weight.new_zeros(())
    for student, teacher in zip(h_s, h_t, strict=True):
        loss += _sum(row_weight, student.shape[1], hidden_mse_rows, student, teacher)
    return loss


def _sum(
    row_weight: Tensor,
    width: int,
    definition: Callable[..., Tensor],
    *states: Tensor,
    blocks: Callable[..., Iterator[slice]] = row_blocks,
) -> Tensor:
    """The weighted sum of a definition's rows, block by block, with temporaries of ``width`` columns."""
    loss = row_weight.new_zeros(())
    for block in blocks(row_weight.shape[0], width, row_weight.device):
        rows = definition(*(x[block] for x in states))
        loss += weighted(rows, row_weight[block]).sum()
    return loss


def hidden_proj_mse_fwd_bwd(
    row_weight: Tensor, h_s: Tensor, weight: Tensor, bias: Tensor | None, h_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum_i w_i |h_s_i W^T + b - h_t_i|^2`` over (N, d_s), (d_t, d_s), (N, d_t), and its gradients."""
    dtype = compute_dtype(h_s, weight, h_t)
    w = weight.to(dtype)
    loss = torch.zeros((), dtype=dtype, device=h_s.device)
    grad_h = torch.empty_like(h_s)
    grad_w = torch.zeros_like(weight, dtype=dtype)
    grad_b = torch.zeros(w.shape[0] if bias is not None else 0, dtype=dtype, device=h_s.device)
    for block in projected_blocks(h_s.shape[0], max(w.shape), h_s.device):
        hidden = h_s[block].to(dtype)
        residual = (hidden @ w.T).sub_(h_t[block].to(dtype))
        if bias is not None:
            residual += bias.to(dtype)
        scaled = residual * row_weight[block].to(dtype).unsqueeze(-1)
        loss += torch.dot(residual.flatten(), scaled.flatten())
        scaled.mul_(2)
        grad_h[block] = (scaled @ w).to(h_s.dtype)
        grad_w.addmm_(scaled.T, hidden)
        if bias is not None:
            grad_b += scaled.sum(0)
    return loss, grad_h, grad_w.to(weight.dtype), bias_gradient(grad_b, bias, weight)


def hidden_proj_mse_sum(
    row_weight: Tensor, h_s: Tensor, weight: Tensor, bias: Tensor | None, h_t: Tensor
) -> Tensor:
    """The same sum alone: one product instead of three."""
    rows = partial(hidden_mse_rows, weight=weight, bias=bias)
    return _sum(row_weight, max(weight.shape), rows, h_s, h_t, blocks=projected_blocks)


def hidden_combine_mse_fwd_bwd(
    row_weight: Tensor,
    h_s: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    h_t: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """``sum_i w_i |cat(h_s)_i - (cat(h_t)_i W^T + b)|^2`` without any concatenation, and its gradients.

    The projection of the concatenated teacher states is a sum of GEMMs over slices of W.
    """
    dtype = compute_dtype(*h_s, *h_t, weight)
    w = weight.to(dtype)
    teacher_slices = torch.split(w, [t.shape[-1] for t in h_t], 1)
    widths = [s.shape[-1] for s in h_s]
    loss = torch.zeros((), dtype=dtype, device=weight.device)
    grads = [torch.empty_like(s) for s in h_s]
    grad_w = torch.zeros_like(w)
    grad_b = torch.zeros(w.shape[0] if bias is not None else 0, dtype=dtype, device=w.device)
    grad_slices = torch.split(grad_w, [t.shape[-1] for t in h_t], 1)
    for block in projected_blocks(h_s[0].shape[0], max(w.shape), w.device):
        teachers = [t[block].to(dtype) for t in h_t]
        target = torch.zeros(teachers[0].shape[0], w.shape[0], dtype=dtype, device=w.device)
        if bias is not None:
            target += bias.to(dtype)
        for teacher, w_slice in zip(teachers, teacher_slices, strict=True):
            target.addmm_(teacher, w_slice.T)
        residuals = torch.split(target, widths, 1)
        for student, residual in zip(h_s, residuals, strict=True):
            residual.neg_().add_(student[block].to(dtype))
        scaled = target * row_weight[block].to(dtype).unsqueeze(-1)
        loss += torch.dot(target.flatten(), scaled.flatten())
        scaled.mul_(2)
        for grad, piece in zip(grads, torch.split(scaled, widths, 1), strict=True):
            grad[block] = piece.to(grad.dtype)
        for grad, teacher in zip(grad_slices, teachers, strict=True):
            grad.addmm_(scaled.T, teacher, alpha=-1)
        if bias is not None:
            grad_b -= scaled.sum(0)
    return loss, grads, grad_w.to(weight.dtype), bias_gradient(grad_b, bias, weight)


def hidden_combine_mse_sum(
    row_weight: Tensor,
    h_s: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    h_t: Sequence[Tensor],
) -> Tensor:
    """The same sum alone; a block of rows is concatenated, which is no more than its target takes."""

    def rows(*states: Tensor) -> Tensor:
        wide = [x.to(row_weight.dtype) for x in states]
        teachers, students = (torch.cat(x, -1) for x in (wide[: len(h_t)], wide[len(h_t) :]))
        return hidden_mse_rows(teachers, students, weight, bias)

    return _sum(row_weight, max(weight.shape), rows, *h_t, *h_s, blocks=projected_blocks)


def hidden_cosine_fwd_bwd(row_weight: Tensor, h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_i w_i (1 - cos_i)`` over (N, d), and its gradient w (cos x / |x|^2 - y / (|x| |y|))."""
    dtype = compute_dtype(h_s, h_t)
    loss = torch.zeros((), dtype=dtype, device=h_s.device)
    grad = torch.empty_like(h_s)
    for block in row_blocks(h_s.shape[0], h_s.shape[1], h_s.device):
        x, y = h_s[block].to(dtype), h_t[block].to(dtype)
        square_x = x.square().sum(-1)
        norm = (square_x.clamp_min(COSINE_EPS) * y.square().sum(-1).clamp_min(COSINE_EPS)).sqrt()
        # Up to COSINE_EPS there is no direction: the cosine is 0 and has no gradient. NaN is not such a length.
        no_direction = square_x <= COSINE_EPS
        cosine = torch.where(no_direction, 0.0, (x * y).sum(-1) / norm)
        weight = row_weight[block].to(dtype)
        loss += weighted(1.0 - cosine, weight).sum()
        # What a row has in common is worked out before the two passes over its columns.
        across = x * (weight * cosine / square_x).unsqueeze(-1)
        across.addcmul_(y, (weight / norm).unsqueeze(-1), value=-1)
        _clear_rows(across, no_direction | (weight == 0))
        grad[block] = across
    return loss, grad


def _clear_rows(x: Tensor, which: Tensor) -> None:
    """Sets rows of (N, d) to 0, whatever they hold."""
    if x.device.type == "cpu":
        # Touches those rows alone; a GPU would have to wait for their number.
        x.index_fill_(0, which.nonzero().squeeze(-1), 0.0)
    else:
        x.masked_fill_(which.unsqueeze(-1), 0.0)


def hidden_cosine_sum(row_weight: Tensor, h_s: Tensor, h_t: Tensor) -> Tensor:
    """The same sum alone."""
    return _sum(row_weight, h_s.shape[1], hidden_cosine_rows, h_s, h_t)
