"""Launches the attention_mse kernels: Gram matrices for long sequences, tiles of scores for short ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertkd.kernels.attention_mse import (
    attention_mse_gram_grad_kernel,
    attention_mse_gram_kernel,
    attention_mse_gram_rows_kernel,
    attention_mse_pairs_kernel,
)
from bertkd.ops.tensors import guard, laid_out_like, unit_stride
from bertkd.ops.triton.attention import (
    Extents,
    Sides,
    extents_of,
    mask_arguments,
    refusal,
    shape_of,
)
from bertkd.ops.triton.config import lookup
from bertkd.ops.triton.sizes import cdiv

__all__ = ["attention_mse_fwd_bwd", "attention_mse_rows", "refusal"]

# Programs that fill a GPU: below it the positions of a Gram matrix are split.
PROGRAMS = 512
# Widest head whose Gram blocks stay in registers.
GRAM_WIDTH = 64
# From this multiple of both widths on the Gram form is the faster one. By counting it would be 1; but its products are
# of fp32 operands (an H200 gains from it between 512 and 1024 tokens of width 64).
GRAM_LENGTH = 5


def gram_pays(length: int, width_s: int, width_t: int) -> bool:
    """Whether two Gram matrices, O(L (D_s + D_t)^2), are less work than the tiles, O(L^2 (D_s + D_t)), and fit."""
    return length > GRAM_LENGTH * (width_s + width_t) and max(width_s, width_t) <= GRAM_WIDTH


def size_of_form(tensors: Sequence[Tensor]) -> int:
    """A small length, with a ragged edge, that takes the same form as the tensors'."""
    length, widths = tensors[0].shape[2], (tensors[0].shape[-1], tensors[-1].shape[-1])
    last = GRAM_LENGTH * sum(widths)
    return last + 21 if gram_pays(length, *widths) else min(61, last)


def attention_mse_rows(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """Sum over real keys of (S_s - S_t)^2 of every query row, (B, H, L)."""
    out = torch.empty(q_s.shape[:-1], dtype=torch.float32, device=q_s.device)
    if out.numel() == 0:
        return out
    sides = unit_strides(q_s, k_s, q_t, k_t)
    scales = usable_scales(scale_s, scale_t)
    with guard(q_s):
        extents = extents_of(mask, None, q_s)
        if gram_pays(q_s.shape[2], q_s.shape[-1], q_t.shape[-1]):
            grams = _grams(sides, mask, None, extents, *scales)
            _gram_rows(sides, grams, out, *scales)
        else:
            pairs_launch(sides, mask, None, extents, out, None, *scales, keys=False)
    return out


def attention_mse_fwd_bwd(
    row_weight: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i sum_j (S_s - S_t)_ij^2`` and its gradients with respect to q_s and k_s, without atomics."""
    if row_weight.numel() == 0:
        return row_weight.sum(), torch.empty_like(q_s), torch.empty_like(k_s)
    sides = unit_strides(q_s, k_s, q_t, k_t)
    scales = usable_scales(scale_s, scale_t)
    with guard(q_s):
        extents = extents_of(mask, row_weight, q_s)
        grad_q, grad_k = torch.empty_like(sides[0]), torch.empty_like(sides[1])
        if gram_pays(q_s.shape[2], q_s.shape[-1], q_t.shape[-1]):
            grams = _grams(sides, mask, row_weight, extents, *scales)
            # The blocks off the diagonal stand for two.
            terms = (grams[:, 0] * grams[:, 1]).sum((0, 2, 3))
            loss = terms.sum() + terms[1]
            for grad, keys in ((grad_q, False), (grad_k, True)):
                _gram_grad(sides, mask, row_weight, extents, grams, grad, *scales, keys=keys)
        else:
            sums = pairs_launch(sides, mask, row_weight, extents, None, grad_q, *scales, keys=False)
            loss = sums.sum()
            pairs_launch(sides, mask, row_weight, extents, None, grad_k, *scales, keys=True)
        return loss, laid_out_like(q_s, grad_q), laid_out_like(k_s, grad_k)


def unit_strides(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Sides:
    return unit_stride(q_s), unit_stride(k_s), unit_stride(q_t), unit_stride(k_t)


def usable_scales(scale_s: float, scale_t: float) -> tuple[float, float]:
    """c_s and c_t / c_s; a student factor of 0 is stood in for by one that no gradient shows."""
    scale_s = scale_s or 1e-20
    return scale_s, scale_t / scale_s


def _gram_constants(sides: Sides, form: str, ratio: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments of the Gram kernels and their launch options."""
    constants = shape_of((sides[0], sides[1]), (sides[2], sides[3])).constants
    config = lookup(form, sides[0], sides[2])
    return {
        "D_S": constants["D_S"],
        "D_T": constants["D_T"],
        "BLOCK": config.block_m,
        "PAD": max(constants["PAD_S"], constants["PAD_T"]),
        # With factors worlds apart the differences would cancel what the halves have in common.
        "EQUAL": constants["D_S"] == constants["D_T"] and abs(ratio) < 1e3,
    }, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _grams(
    sides: Sides,
    mask: Tensor | None,
    weight: Tensor | None,
    extents: Extents,
    scale_s: float,
    ratio: float,
) -> Tensor:
    """Blocks 11, 12, 22 of B^T B, and of A^T W A where there are weights: (B * H, 1 or 2, 3, P, P) fp32."""
    q_s = sides[0]
    batch, heads, length, _ = q_s.shape
    constants, options = _gram_constants(sides, "gram", ratio)
    count = 1 if weight is None else 2
    programs = batch * heads * count * 3
    splits = max(1, min(PROGRAMS // programs, length // (4 * constants["BLOCK"])))
    pad = constants["PAD"]
    grams = torch.empty(
        (splits, batch * heads, count, 3, pad, pad), dtype=torch.float32, device=q_s.device
    )
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    attention_mse_gram_kernel[(programs * splits,)](
        *sides,
        bits,
        extents.peak if weight is None else weight,
        extents.table,
        grams,
        *(stride for x in sides for stride in x.stride()[:3]),
        mask_b,
        mask_l,
        *((0, 0, 0) if weight is None else weight.stride()),
        heads,
        splits,
        length,
        scale_s,
        ratio,
        **constants,
        HAS_MASK=mask is not None,
        SIDES=count,
        **options,
        enable_fp_fusion=True,
    )
    return grams[0] if splits == 1 else grams.sum(0)


def _gram_grad(
    sides: Sides,
    mask: Tensor | None,
    weight: Tensor,
    extents: Extents,
    grams: Tensor,
    grad: Tensor,
    scale_s: float,
    ratio: float,
    *,
    keys: bool,
) -> None:
    """Fill the gradient of q_s, or with ``keys`` of k_s."""
    q_s, k_s, q_t, k_t = sides
    x_s, x_t = (k_s, k_t) if keys else (q_s, q_t)
    batch, heads, length, _ = x_s.shape
    constants, options = _gram_constants(sides, "gram_grad", ratio)
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    attention_mse_gram_grad_kernel[(batch * heads * cdiv(length, constants["BLOCK"]),)](
        x_s,
        x_t,
        bits,
        weight,
        extents.table,
        grams,
        grad,
        *x_s.stride()[:3],
        *x_t.stride()[:3],
        mask_b,
        mask_l,
        *weight.stride(),
        *grad.stride()[:3],
        heads,
        length,
        scale_s,
        ratio,
        **constants,
        HAS_MASK=mask is not None,
        KEYS=keys,
        **options,
        enable_fp_fusion=True,
    )


def _gram_rows(sides: Sides, grams: Tensor, out: Tensor, scale_s: float, ratio: float) -> None:
    """Fill ``out`` (B, H, L) with A_i (B^T B) A_i."""
    q_s, _, q_t, _ = sides
    batch, heads, length, _ = q_s.shape
    constants, options = _gram_constants(sides, "gram_rows", ratio)
    attention_mse_gram_rows_kernel[(batch * heads * cdiv(length, constants["BLOCK"]),)](
        q_s,
        q_t,
        grams,
        out,
        *q_s.stride()[:3],
        *q_t.stride()[:3],
        heads,
        length,
        scale_s,
        ratio,
        **constants,
        **options,
        enable_fp_fusion=True,
    )


def pairs_launch(
    sides: Sides,
    mask: Tensor | None,
    weight: Tensor | None,
    extents: Extents,
    out: Tensor | None,
    grad: Tensor | None,
    scale_s: float,
    ratio: float,
    *,
    keys: bool,
    window: int | None = None,
) -> Tensor:
    """Run the tile kernel over queries, or with ``keys`` over keys, whose gradient goes to ``grad``.

    Returns:
        ``out`` with every row's sum, or if that is None the blocks' shares of the loss (unwritten with ``keys``).
    """
    q_s, k_s, q_t, k_t = sides
    shape = shape_of((q_s, k_s), (q_t, k_t))
    config = lookup("pairs", q_s, q_t)
    blocks = shape.batch * shape.heads * cdiv(shape.length, config.block_m)
    rows = out
    if rows is None:
        rows = torch.empty(blocks, dtype=torch.float32, device=q_s.device)
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    flags = bits, (mask_b, 0, mask_l), mask is not None
    weights = (
        (extents.peak, (0, 0, 0), False) if weight is None else (weight, weight.stride(), True)
    )
    own, other = (flags, weights) if keys else (weights, flags)
    order = (k_s, k_t, q_s, q_t) if keys else (q_s, q_t, k_s, k_t)
    attention_mse_pairs_kernel[(blocks,)](
        *order,
        own[0],
        other[0],
        extents.table,
        rows,
        rows if grad is None else grad,
        *(stride for x in order for stride in x.stride()[:3]),
        *own[1],
        *other[1],
        *((0, 0, 0) if grad is None else grad.stride()[:3]),
        shape.heads,
        shape.length,
        scale_s,
        ratio,
        window,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **shape.constants,
        OWN=own[2],
        OTHER=other[2],
        KEYS=keys,
        SUM=out is None,
        GRAD=grad is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return rows
