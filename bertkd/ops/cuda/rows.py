"""Launchers of the row kernels, softmax_kl and hidden_mse: allocate, pass addresses and the current stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertkd.ops.cuda.library import kernels, launch, workspace
from bertkd.ops.tensors import guard, rows


def softmax_kl_rows(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)) of every row: (N, C) -> (N,)."""
    if z_s.numel() == 0:
        return z_s.new_zeros(z_s.shape[0], dtype=torch.float32)
    with guard(z_s):
        out = torch.empty(z_s.shape[0], dtype=torch.float32, device=z_s.device)
        where = launch(workspace(z_s, 0))
        args = (z_s.shape[0], rows(z_s), rows(z_t), temperature, out.data_ptr(), where)
        kernels().softmax_kl_rows(*args)
    return out


def softmax_kl_fwd_bwd(
    row_weight: Tensor, z_s: Tensor, z_t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradient ``row_weight (P_s - P_t) / T``; rows of weight 0 are not read."""
    if z_s.numel() == 0:
        return z_s.new_zeros((), dtype=torch.float32), torch.empty_like(z_s)
    with guard(z_s):
        loss = torch.empty((), dtype=torch.float32, device=z_s.device)
        grad = torch.empty_like(z_s)
        work = workspace(z_s, kernels().softmax_kl_workspace(z_s.shape[0]))
        kernels().softmax_kl_fwd_bwd(
            z_s.shape[0],
            (row_weight.data_ptr(), row_weight.stride(0)),
            rows(z_s),
            rows(z_t),
            temperature,
            loss.data_ptr(),
            rows(grad),
            launch(work),
        )
    return loss, grad


def hidden_mse_fwd_bwd(
    row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``sum_k sum_i w_i |h_s[k]_i - h_t[k]_i|^2`` over states of (N, d), and its gradients, in one launch."""
    with guard(h_s[0]):
        grads = [torch.empty_like(x) for x in h_s]
    return _hidden_mse(row_weight, h_s, h_t, grads), grads


def hidden_mse_sum(row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]) -> Tensor:
    """The same sum alone: nothing is written."""
    return _hidden_mse(row_weight, h_s, h_t, [])


def _hidden_mse(
    row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor], grads: Sequence[Tensor]
) -> Tensor:
    """The sum; fills ``grads``, unless there are none."""
    first = h_s[0]
    if first.numel() == 0:
        return first.new_zeros((), dtype=torch.float32)
    with guard(first):
        loss = torch.empty((), dtype=torch.float32, device=first.device)
        work = workspace(first, kernels().hidden_mse_workspace(len(h_s), first.shape[0]))
        kernels().hidden_mse(
            first.shape[0],
            (row_weight.data_ptr(), row_weight.stride(0)),
            [rows(x) for x in h_s],
            [rows(x) for x in h_t],
            [rows(x) for x in grads],
            loss.data_ptr(),
            launch(work),
        )
    return loss
