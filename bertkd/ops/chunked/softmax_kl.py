"""softmax_kl: blocks of rows, probabilities formed in place in the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bertkd.ops.chunked.tiles import Workspace, budget, kl_sweep, low
from bertkd.ops.rows import weighted
from bertkd.reference import compute_dtype

# Every block of projected rows reads the weights whole and adds to their gradient: a few rows would spend their time on
# that.
LEAST_ROWS = 256


def projected_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """``row_blocks`` for rows that are multiplied with weights."""
    return row_blocks(rows, width, device, LEAST_ROWS)


def row_blocks(rows: int, width: int, device: torch.device, least: int = 1) -> Iterator[slice]:
    """Slices of rows such that a block of ``width`` columns fits the tile budget, but of ``least`` rows at least."""
    step = max(least, budget(device) // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _sweep(
    z_s: Tensor, z_t: Tensor, block: slice, temperature: float, work: Workspace
) -> tuple[Tensor, Tensor]:
    shape = z_s[block].shape
    s, t = work.get("s", *shape), work.get("t", *shape)
    for logits, z in ((s, z_s[block]), (t, z_t[block])):
        # Off before the division, which would round the large ones: what they share costs no digits.
        top = logits.copy_(z).amax(-1, keepdim=True).clamp_min_(low(work.dtype))
        # Classes may be masked with -inf on both sides: two finite numbers have a difference.
        logits.sub_(top).div_(temperature).clamp_(min=low(work.dtype))
    return kl_sweep(s, t, work.get("p", *shape))


def softmax_kl_rows(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)) of every row: (N, C) -> (N,)."""
    work = Workspace(compute_dtype(z_s, z_t), z_s.device)
    out = torch.empty(z_s.shape[0], dtype=work.dtype, device=z_s.device)
    for block in row_blocks(z_s.shape[0], z_s.shape[1], z_s.device):
        out[block] = _sweep(z_s, z_t, block, temperature, work)[0]
    return out


def softmax_kl_fwd_bwd(
    row_weight: Tensor, z_s: Tensor, z_t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradient ``row_weight (P_s - P_t) / T``."""
    work = Workspace(compute_dtype(z_s, z_t), z_s.device)
    loss = torch.zeros((), dtype=work.dtype, device=z_s.device)
    grad = torch.empty_like(z_s)
    for block in row_blocks(z_s.shape[0], z_s.shape[1], z_s.device):
        rows, difference = _sweep(z_s, z_t, block, temperature, work)
        weight = row_weight[block].to(work.dtype)
        loss += weighted(rows, weight).sum()
        difference.mul_(weight.unsqueeze(-1) / temperature)
        # 0 times NaN is not 0.
        grad[block] = difference.masked_fill_((weight == 0).unsqueeze(-1), 0.0)
    return loss, grad
