"""Masks and row weights: what all losses share between their arguments and their ops."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.checks import check_device, check_mask, check_tensor


def as_mask(op: str, mask: Tensor | None, like: Tensor, rows: tuple[int, ...]) -> Tensor | None:
    """Check ``mask`` against the row shape and make it boolean."""
    if mask is None:
        return None
    check_mask(op, mask, rows, like.device)
    return mask.bool()


def weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows * weight``, and 0 where the weight is 0, whatever is there: a pad row may hold NaN."""
    return torch.where(weight == 0, 0.0, rows * weight)


def counted_rows(row_weight: Tensor) -> Tensor | None:
    """Indices of the rows (N,) that weigh anything. None for all of them: if every one does, as a copy of the states
    would cost more than decoders of few classes, and during a capture of a CUDA graph, which cannot wait for a number.
    """
    if row_weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    kept = row_weight.nonzero().squeeze(-1)
    return None if kept.numel() == row_weight.numel() else kept


def row_weights(
    op: str,
    rows: tuple[int, ...],
    mask: Tensor | None,
    row_weight: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Weights of the rows and the number of rows that count.

    Args:
        op: name of the loss, for messages.
        rows: shape of the rows, e.g. (B, L).
        mask: boolean, shape ``rows``: rows that count; None counts all.
        row_weight: shape ``rows``, or its leading dimensions, e.g. (B,).

    Returns:
        The weights, shape ``rows``, and the count as a 0-d tensor of at least 1 (so that nothing to
        average is 0 and not NaN). Weights multiply rows; they do not change the count.
    """
    weight = torch.ones(rows, dtype=dtype, device=device) if mask is None else mask.to(dtype)
    if mask is None and not torch.compiler.is_compiling():
        # Known without asking the device, which would take a kernel or two.
        count = torch.full((), max(1.0, float(weight.numel())), dtype=dtype, device=device)
    else:
        count = weight.sum().clamp_min(1.0)
    if row_weight is not None:
        check_tensor(op, "row_weight", row_weight)
        if tuple(row_weight.shape) != rows[: row_weight.dim()] or (rows and row_weight.dim() == 0):
            wanted = " or ".join(map(str, dict.fromkeys((rows, rows[:1]))))
            raise ValueError(
                f"{op}: row_weight must have shape {wanted}, got {tuple(row_weight.shape)}."
            )
        check_device(op, "row_weight", row_weight, device)
        extra = len(rows) - row_weight.dim()
        weight = weight * row_weight.detach().to(dtype).reshape((*row_weight.shape, *[1] * extra))
    return weight, count
