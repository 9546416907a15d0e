"""linear_kl: PyTorch's matrix products around the row kernel, a block of rows of both decoders' logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.ops.native.library import in_large_pages
from bertkd.ops.native.rows import softmax_kl_into, softmax_kl_rows

# Every block reads both decoders whole, and adds to the (V, d) gradient of one: fewer rows spend their time on that.
BLOCK = 256


class _Side(NamedTuple):
    """One decoder in float32: states (N, d), weight (V, d), bias (V,), and memory for a block of its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    memory: Tensor

    def logits(self, rows: slice) -> Tensor:
        """(n, V); overwritten by the next call."""
        hidden = self.hidden[rows]
        out = self.memory[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)


def _side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Side:
    shape = min(BLOCK, hidden.shape[0]), weight.shape[0]
    memory = in_large_pages(torch.empty(shape, dtype=torch.float32))
    return _Side(hidden.float(), weight.float(), None if bias is None else bias.float(), memory)


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, BLOCK):
        yield slice(start, min(start + BLOCK, rows))


def linear_kl_rows(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
) -> Tensor:
    """``softmax_kl_rows`` of the decoders' logits: (N, d_s), (V, d_s), (N, d_t), (V, d_t) -> (N,)."""
    student, teacher = _side(h_s, w_s, bias_s), _side(h_t, w_t, bias_t)
    out = torch.empty(h_s.shape[0], dtype=torch.float32)
    for rows in _blocks(h_s.shape[0]):
        out[rows] = softmax_kl_rows(student.logits(rows), teacher.logits(rows), temperature)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients with respect to the student's states, weight and bias.

    Rows of weight 0 are never projected: for masked language modelling that is 85 % of the work.
    """
    kept = row_weight.nonzero().squeeze(-1)
    weight = row_weight[kept]
    student, teacher = _side(h_s[kept], w_s, bias_s), _side(h_t[kept], w_t, bias_t)
    loss = torch.zeros((), dtype=torch.float32)
    grad_h = torch.empty(student.hidden.shape, dtype=torch.float32)
    grad_w = in_large_pages(torch.zeros(w_s.shape, dtype=torch.float32))
    grad_b = torch.zeros(0 if bias_s is None else w_s.shape[0], dtype=torch.float32)
    for rows in _blocks(kept.numel()):
        logits = student.logits(rows)
        # The student's logits become their gradient, in place.
        loss += softmax_kl_into(weight[rows], logits, teacher.logits(rows), temperature, logits)
        torch.mm(logits, student.weight, out=grad_h[rows])
        grad_w.addmm_(logits.T, student.hidden[rows])
        if bias_s is not None:
            grad_b += logits.sum(0)
    whole = torch.zeros_like(h_s).index_copy_(0, kept, grad_h.to(h_s.dtype))
    bias_dtype = w_s.dtype if bias_s is None else bias_s.dtype
    return loss, whole, grad_w.to(w_s.dtype), grad_b.to(bias_dtype)
