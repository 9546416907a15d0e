"""linear_kl: PyTorch's matrix products around the row kernel, a block of rows of both decoders' logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.ops.native.library import in_large_pages
from bertkd.ops.native.rows import softmax_kl_into, softmax_kl_rows
from bertkd.ops.rows import counted_rows
from bertkd.ops.tensors import bias_gradient

# Every block reads both decoders whole, and adds to the (V, d) gradient of one: fewer rows spend their time on that.
# With few classes they spend it between the calls, so there a block has more, while its logits stay in the cache.
LEAST_ROWS, MOST_ROWS = 256, 2048
LOGITS = 1 << 18


class _Side(NamedTuple):
    """One decoder in float32: weight (V, d), bias (V,), and memory for a block of its logits."""

    weight: Tensor
    bias: Tensor | None
    memory: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) of states (n, d) in float32; overwritten by the next call."""
        out = self.memory[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)


def _side(rows: int, weight: Tensor, bias: Tensor | None) -> _Side:
    shape = min(_block(weight.shape[0]), rows), weight.shape[0]
    memory = in_large_pages(torch.empty(shape, dtype=torch.float32))
    return _Side(weight.float(), None if bias is None else bias.float(), memory)


def _block(classes: int) -> int:
    return max(LEAST_ROWS, min(MOST_ROWS, LOGITS // classes))


def _blocks(rows: int, classes: int) -> Iterator[slice]:
    step = _block(classes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


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
    count, classes = h_s.shape[0], w_s.shape[0]
    student, teacher = _side(count, w_s, bias_s), _side(count, w_t, bias_t)
    out = torch.empty(count, dtype=torch.float32)
    for rows in _blocks(count, classes):
        logits_s, logits_t = student.logits(h_s[rows].float()), teacher.logits(h_t[rows].float())
        out[rows] = softmax_kl_rows(logits_s, logits_t, temperature)
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
    kept = counted_rows(row_weight)
    count, classes = row_weight.shape[0] if kept is None else kept.numel(), w_s.shape[0]
    student, teacher = _side(count, w_s, bias_s), _side(count, w_t, bias_t)
    loss = torch.zeros((), dtype=torch.float32)
    grad_h = torch.empty_like(h_s) if kept is None else torch.zeros_like(h_s)
    biased = decoder_grad and bias_s is not None
    grad_w = in_large_pages(torch.zeros(w_s.shape if decoder_grad else 0, dtype=torch.float32))
    grad_b = torch.zeros(classes if biased else 0, dtype=torch.float32)
    for block in _blocks(count, classes):
        # Slices are views: the states themselves are copied only where rows are left out.
        rows = block if kept is None else kept[block]
        hidden = h_s[rows].float()
        logits_s, logits_t = student.logits(hidden), teacher.logits(h_t[rows].float())
        # The student's logits become their gradient, in place.
        loss += softmax_kl_into(row_weight[rows], logits_s, logits_t, temperature, logits_s)
        grad_h[rows] = torch.mm(logits_s, student.weight).to(h_s.dtype)
        if decoder_grad:
            grad_w.addmm_(logits_s.T, hidden)
        if biased:
            grad_b += logits_s.sum(0)
    return loss, grad_h, grad_w.to(w_s.dtype), bias_gradient(grad_b, bias_s, w_s)
