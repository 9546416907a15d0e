"""linear_kl: the KL of two decoders' logits, never more than a block of rows of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.chunked.softmax_kl import projected_blocks
from bertkd.ops.chunked.tiles import Workspace, kl_sweep
from bertkd.ops.rows import counted_rows
from bertkd.ops.tensors import bias_gradient
from bertkd.reference import compute_dtype


class _Decoders:
    """Both decoders' logits of a block of rows, divided by the temperature, and their sweep."""

    def __init__(self, h_s, w_s, bias_s, h_t, w_t, bias_t, temperature) -> None:
        self.dtype = compute_dtype(h_s, w_s, h_t, w_t)
        self.sides = []
        for hidden, weight, bias in ((h_s, w_s, bias_s), (h_t, w_t, bias_t)):
            bias = None if bias is None else bias.to(self.dtype) / temperature
            self.sides.append((hidden, weight.to(self.dtype), bias))
        self.temperature = temperature
        self.work = Workspace(self.dtype, h_s.device)

    def sweep(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Row KL (n,), P_s - P_t (n, V), and the student's hidden states of the rows (n, d)."""
        hidden = [side[0][rows].to(self.dtype) for side in self.sides]
        s, t = (
            self._logits(name, h, side)
            for name, h, side in zip("st", hidden, self.sides, strict=True)
        )
        row_kl, difference = kl_sweep(s, t, self.work.get("p", *s.shape))
        return row_kl, difference, hidden[0]

    def _logits(self, name: str, hidden: Tensor, side: tuple) -> Tensor:
        _, weight, bias = side
        out = self.work.get(name, hidden.shape[0], weight.shape[0])
        torch.mm(hidden, weight.T, out=out).div_(self.temperature)
        return out if bias is None else out.add_(bias)


def linear_kl_rows(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    decoder_grad: bool,
) -> Tensor:
    """``softmax_kl_rows`` of the decoders' logits: (N, d_s), (V, d_s), (N, d_t), (V, d_t) -> (N,)."""
    decoders = _Decoders(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature)
    out = torch.empty(h_s.shape[0], dtype=decoders.dtype, device=h_s.device)
    for block in projected_blocks(h_s.shape[0], w_s.shape[0], h_s.device):
        out[block] = decoders.sweep(block)[0]
    return out


def linear_kl_fwd_bwd(
    row_weight: Tensor,
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    decoder_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients with respect to the student's states, weight and bias.

    Rows of weight 0 are never projected: for masked language modelling that is 85 % of the work. Without
    ``decoder_grad`` the last two gradients are empty: a frozen decoder's cost a fourth of the products.
    """
    decoders = _Decoders(h_s, w_s, bias_s, h_t, w_t, bias_t, temperature)
    dtype = decoders.dtype
    weight_s = decoders.sides[0][1]
    kept = counted_rows(row_weight)
    loss = torch.zeros((), dtype=dtype, device=h_s.device)
    grad_h = torch.zeros_like(h_s)
    biased = decoder_grad and bias_s is not None
    grad_w = torch.zeros(w_s.shape if decoder_grad else 0, dtype=dtype, device=h_s.device)
    grad_b = torch.zeros(w_s.shape[0] if biased else 0, dtype=dtype, device=h_s.device)
    count = row_weight.shape[0] if kept is None else kept.numel()
    for block in projected_blocks(count, w_s.shape[0], h_s.device):
        rows = block if kept is None else kept[block]
        row_kl, difference, hidden = decoders.sweep(rows)
        weight = row_weight[rows].to(dtype)
        loss += torch.dot(row_kl, weight)
        difference.mul_(weight.unsqueeze(-1) / temperature)
        grad_h[rows] = (difference @ weight_s).to(h_s.dtype)
        if decoder_grad:
            grad_w.addmm_(difference.T, hidden)
        if biased:
            grad_b += difference.sum(0)
    return loss, grad_h, grad_w.to(w_s.dtype), bias_gradient(grad_b, bias_s, w_s)
