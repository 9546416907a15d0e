"""Losses on logits: row KL, and the KL of two decoders' logits that are never built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bertkd import reference
from bertkd.ops.autograd import Arg, in_float32, row_loss, sum_loss
from bertkd.ops.checks import check_bias, check_options, check_tensors
from bertkd.ops.dispatch import requested
from bertkd.ops.rows import as_mask, row_weights


def softmax_kl(
    z_s: Tensor,
    z_t: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    t_squared: bool = False,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)), mean over the rows that count.

    Equivalent, without masks, to
    ``kl_div(log_softmax(z_s / T, -1), softmax(z_t / T, -1), reduction="batchmean")`` over flattened rows.

    Args:
        z_s, z_t: logits (..., C).
        mask: shape of the rows (...,), 1 = counts (masked language modelling: the masked tokens).
        temperature: T.
        t_squared: multiply by T^2, which keeps the gradient's size as T grows (Hinton et al., 2015).
        row_weight, reduction, impl: see the module.

    Returns:
        A 0-d tensor, or one value per row.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
    """
    op = "softmax_kl"
    check_options(op, reduction, temperature)
    check_tensors(op, None, z_s=z_s, z_t=z_t)
    if z_s.shape != z_t.shape:
        raise ValueError(
            f"{op}: z_s {tuple(z_s.shape)} and z_t {tuple(z_t.shape)} must have one shape: the same batch and the "
            "same labels (or vocabulary) in the same order."
        )
    classes = z_s.shape[-1]
    z_t = z_t.detach()
    return _row_kl(
        op,
        (z_s.reshape(-1, classes), z_t.reshape(-1, classes), temperature),
        (0,),
        partial(reference.softmax_kl_rows, z_s, z_t, temperature),
        like=z_s,
        dtype=reference.compute_dtype(z_s, z_t),
        mask=mask,
        row_weight=row_weight,
        factor=temperature**2 if t_squared else 1.0,
        reduction=reduction,
        impl=impl,
    )


def logit_kl(
    z_s: Tensor, z_t: Tensor, mask: Tensor | None = None, *, t_squared: bool = True, **options: Any
) -> Tensor:
    """``softmax_kl`` with Hinton's T^2 unless told otherwise: knowledge distillation on logits ("KD")."""
    return softmax_kl(z_s, z_t, mask, t_squared=t_squared, **options)


def linear_kl(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
    mask: Tensor | None = None,
    *,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """``softmax_kl(linear(h_s, w_s, bias_s), linear(h_t, w_t, bias_t))`` without building the (N, V) logits.

    Rows that do not count are not projected at all.

    Args:
        h_s: student states before the decoder (..., d_s).
        w_s: student decoder (V, d_s); gets a gradient, as do ``h_s`` and ``bias_s``. Frozen ones cost no time for it.
        h_t, w_t: teacher (..., d_t) and (V, d_t).
        mask: shape of the rows, 1 = counts.
        bias_s, bias_t: (V,).
        temperature, t_squared, row_weight, reduction, impl: as in ``softmax_kl``.

    Returns:
        A 0-d tensor, or one value per row.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    op = "linear_kl"
    check_options(op, reduction, temperature)
    check_tensors(op, None, h_s=h_s, h_t=h_t)
    check_tensors(op, 2, w_s=w_s, w_t=w_t)
    if h_s.shape[:-1] != h_t.shape[:-1]:
        raise ValueError(
            f"{op}: h_s has rows {tuple(h_s.shape[:-1])} and h_t {tuple(h_t.shape[:-1])}; feed both the same batch."
        )
    for side, hidden, weight in (("s", h_s, w_s), ("t", h_t, w_t)):
        if weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{op}: w_{side} {tuple(weight.shape)} does not take h_{side} of width {hidden.shape[-1]}; "
                "decoder weights are (V, d) as in nn.Linear."
            )
    vocabulary = w_s.shape[0]
    if w_t.shape[0] != vocabulary:
        raise ValueError(
            f"{op}: w_s has {vocabulary} rows and w_t {w_t.shape[0]}: both decoders need one vocabulary."
        )
    if vocabulary == 0:
        raise ValueError(
            f"{op}: w_s and w_t have no rows; decoder weights are (V, d), V at least 1."
        )
    for name, bias in (("bias_s", bias_s), ("bias_t", bias_t)):
        check_bias(op, name, bias, vocabulary, h_s.device)
    h_t, w_t = h_t.detach(), w_t.detach()
    bias_t = None if bias_t is None else bias_t.detach()
    flat = [x.reshape(-1, x.shape[-1]) for x in (h_s, h_t)]
    trained = any(x is not None and x.requires_grad for x in (w_s, bias_s))
    return _row_kl(
        op,
        (flat[0], in_float32(w_s), in_float32(bias_s), flat[1], w_t, bias_t, temperature, trained),
        (0, 1, 2),
        partial(reference.linear_kl_rows, h_s, w_s, h_t, w_t, bias_s, bias_t, temperature),
        like=h_s,
        dtype=reference.compute_dtype(h_s, w_s, h_t, w_t),
        mask=mask,
        row_weight=row_weight,
        factor=temperature**2 if t_squared else 1.0,
        reduction=reduction,
        impl=impl,
    )


def _row_kl(
    op: str,
    args: Sequence[Arg],
    wrt: Sequence[int],
    definition: Callable[[], Tensor],
    *,
    like: Tensor,
    dtype: torch.dtype,
    mask: Tensor | None,
    row_weight: Tensor | None,
    factor: float,
    reduction: str,
    impl: str,
) -> Tensor:
    """Masks, choice of implementation and reduction of both row KLs.

    Args:
        op, args, wrt: as for ``sum_loss``.
        definition: gives the rows by the reference, in the shape of the user's.
        like: (..., anything), for the rows' shape and device.
        dtype: of the sums.
        factor: on the loss.
    """
    rows = tuple(like.shape[:-1])
    mask = as_mask(op, mask, like, rows)
    weights, count = row_weights(op, rows, mask, row_weight, dtype=dtype, device=like.device)
    impl = requested(impl)
    # One factor for both: T^2 goes the way of the mean.
    divisor = count / factor if reduction == "mean" else None
    if impl == "eager":
        loss = definition() * weights
        loss = loss if reduction == "none" else loss.sum()
        return loss * factor if divisor is None else loss / divisor
    if reduction == "none":
        return row_loss(op, impl, weights.reshape(-1), args, wrt).view(rows) * factor
    loss = sum_loss(op, impl, weights.reshape(-1), args, wrt, divisor)
    return loss * factor if divisor is None else loss
