"""Launchers of hidden_mse and softmax_kl: rows of states or logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertkd.ops.native.library import empty_rows, kernels
from bertkd.ops.tensors import rows, unit_stride


def hidden_mse_fwd_bwd(
    row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``sum_k sum_i w_i |h_s[k]_i - h_t[k]_i|^2`` over states of (N, d), and its gradients, in one launch."""
    outputs = [empty_rows(x) for x in h_s]
    loss = _hidden_mse(row_weight, h_s, h_t, [written for _, written in outputs])
    return loss, [g if g is written else g.copy_(written) for g, written in outputs]


def hidden_mse_sum(row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]) -> Tensor:
    """The same sum alone: nothing is written."""
    return _hidden_mse(row_weight, h_s, h_t, [])


def _hidden_mse(
    row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor], grads: Sequence[Tensor]
) -> Tensor:
    """The sum; fills ``grads``, unless there are none."""
    students, teachers = [unit_stride(x) for x in h_s], [unit_stride(x) for x in h_t]
    # A tensor without elements has no address.
    if row_weight.numel() == 0:
        return torch.zeros((), dtype=torch.float32)
    loss = torch.empty((), dtype=torch.float32)
    kernels().hidden_mse(
        row_weight.shape[0],
        (row_weight.data_ptr(), row_weight.stride(0)),
        [rows(x) for x in students],
        [rows(x) for x in teachers],
        [rows(x) for x in grads],
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    return loss


def softmax_kl_rows(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)) of every row: (N, C) -> (N,)."""
    z_s, z_t = unit_stride(z_s), unit_stride(z_t)
    out = torch.empty(z_s.shape[0], dtype=torch.float32)
    if out.numel() == 0:
        return out
    kernels().softmax_kl_rows(
        z_s.shape[0], rows(z_s), rows(z_t), temperature, out.data_ptr(), torch.get_num_threads()
    )
    return out


def softmax_kl_fwd_bwd(
    row_weight: Tensor, z_s: Tensor, z_t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradient ``row_weight (P_s - P_t) / T``."""
    grad, written = empty_rows(z_s)
    loss = softmax_kl_into(row_weight, z_s, z_t, temperature, written)
    return loss, grad if grad is written else grad.copy_(written)


def softmax_kl_into(
    row_weight: Tensor, z_s: Tensor, z_t: Tensor, temperature: float, grad: Tensor
) -> Tensor:
    """``sum(row_weight * KL)``; its gradient goes to ``grad``, which may be ``z_s`` itself."""
    z_s, z_t = unit_stride(z_s), unit_stride(z_t)
    if row_weight.numel() == 0:
        return torch.zeros((), dtype=torch.float32)
    loss = torch.empty((), dtype=torch.float32)
    kernels().softmax_kl_fwd_bwd(
        z_s.shape[0],
        (row_weight.data_ptr(), row_weight.stride(0)),
        rows(z_s),
        rows(z_t),
        temperature,
        loss.data_ptr(),
        rows(grad),
        torch.get_num_threads(),
    )
    return loss
