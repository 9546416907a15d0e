"""Launches the relation_kl kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.kernels.relation_kl import relation_kl_keys_kernel, relation_kl_rows_kernel
from bertkd.kernels.relation_kl_short import relation_kl_short_kernel
from bertkd.ops.tensors import guard, laid_out_like, unit_stride
from bertkd.ops.triton.attention import (
    LOG2E,
    Extents,
    Sides,
    block_length,
    extents_of,
    mask_arguments,
    refusal,
    shape_of,
)
from bertkd.ops.triton.config import TINY, Config, lookup, short_config, short_programs
from bertkd.ops.triton.sizes import cdiv

__all__ = ["refusal", "relation_kl_fwd_bwd", "relation_kl_rows"]


def relation_kl_rows(
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """KL of every query row, (B, H, L), in one pass over the keys; see ``bertkd.reference.relation_kl_rows``."""
    out = torch.empty(a_s.shape[:-1], dtype=torch.float32, device=a_s.device)
    if out.numel():
        sides = positive_sides(a_s, b_s, a_t, b_t, scale_s, scale_t)
        with guard(a_s):
            extents = extents_of(mask, None, a_s)
            rows_launch("rows", sides, mask, None, extents, out, scale_s, scale_t)
    return out


def relation_kl_fwd_bwd(
    row_weight: Tensor,
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients with respect to a_s and b_s, without atomics."""
    if row_weight.numel() == 0:
        return row_weight.sum(), torch.empty_like(a_s), torch.empty_like(b_s)
    sides = positive_sides(a_s, b_s, a_t, b_t, scale_s, scale_t)
    config = short_config("short", a_s, a_t)
    with guard(a_s):
        grad_a, grad_b = torch.empty_like(sides[0]), torch.empty_like(sides[1])
        extents = extents_of(mask, row_weight, a_s)
        if config is None:
            loss = tiled_launches(
                sides, mask, row_weight, extents, (grad_a, grad_b), scale_s, scale_t
            )
        else:
            loss = _short_launch(
                config, sides, mask, row_weight, extents, grad_a, grad_b, scale_s, scale_t
            ).sum()
        return loss, laid_out_like(a_s, grad_a), laid_out_like(b_s, grad_b)


def positive_sides(a_s, b_s, a_t, b_t, scale_s: float, scale_t: float) -> Sides:
    """The tensors as the kernels want them: a row maximum times a factor is the maximum only if that is positive."""
    a_s = -a_s if scale_s < 0 else a_s
    a_t = -a_t if scale_t < 0 else a_t
    return unit_stride(a_s), unit_stride(b_s), unit_stride(a_t), unit_stride(b_t)


def tiled_launches(
    sides: Sides,
    mask: Tensor | None,
    weight: Tensor,
    extents: Extents,
    grads: tuple[Tensor, Tensor],
    scale_s: float,
    scale_t: float,
    *,
    window: int | None = None,
    summed: bool = False,
) -> Tensor:
    """Run the row kernel and then the key kernel, which fill the gradients; ``summed``: both roles' in the second.

    Returns:
        The loss: one sum over the shares of both kernels' blocks.
    """
    a_s, _, a_t, _ = sides
    heads = a_s.shape[0] * a_s.shape[1]
    of_rows = heads * cdiv(a_s.shape[2], lookup("grad_rows", a_s, a_t).block_m)
    of_keys = heads * cdiv(a_s.shape[2], lookup("grad_keys", a_s, a_t).block_n)
    # Kernels are compiled for pointers to multiples of 16 bytes; what the gap then holds is summed too.
    gap = -of_rows % 4
    made = torch.zeros if gap else torch.empty
    shares = made(of_rows + gap + of_keys, dtype=torch.float32, device=a_s.device)
    stats = torch.empty((4, *weight.shape), dtype=torch.float32, device=a_s.device)
    scales = scale_s, scale_t
    rows_launch("grad_rows", sides, mask, weight, extents, stats, *scales, grads[0], shares, window)
    other = grads[0] if summed else None
    shares_of_keys = shares[of_rows + gap :]
    keys_launch(sides, mask, extents, stats, grads[1], *scales, shares_of_keys, other, window)
    return shares.sum()


def rows_launch(
    form: str,
    sides: Sides,
    mask: Tensor | None,
    weight: Tensor | None,
    extents: Extents,
    out: Tensor,
    scale_s: float,
    scale_t: float,
    grad_a: Tensor | None = None,
    shares: Tensor | None = None,
    window: int | None = None,
) -> None:
    """Run the row kernel.

    Args:
        form: the configuration's name.
        weight: (B, H, L), or None for every row's KL.
        out: (B, H, L) for the rows; (4, B, H, L) for the statistics of the rows where there are weights.
        grad_a: to be filled, or None.
        shares: to be filled with the weighted sums of blocks of rows where there are weights.
        window: how many tokens to either side a row compares, or None for all.
    """
    a_s, b_s, a_t, b_t = sides
    shape = shape_of((a_s, b_s), (a_t, b_t))
    config = lookup(form, a_s, a_t)
    blocks = shape.batch * shape.heads * cdiv(shape.length, config.block_m)
    rows = out if shares is None else shares
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    relation_kl_rows_kernel[(blocks,)](
        *sides,
        bits,
        extents.peak if weight is None else weight,
        *extents,
        rows,
        out,
        rows if grad_a is None else grad_a,
        *(stride for x in sides for stride in x.stride()[:3]),
        mask_b,
        mask_l,
        *((0, 0, 0) if weight is None else weight.stride()),
        *((0, 0, 0) if grad_a is None else grad_a.stride()[:3]),
        shape.heads,
        shape.length,
        abs(scale_s) * LOG2E,
        abs(scale_t) * LOG2E,
        scale_s,
        window,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **shape.constants,
        HAS_MASK=mask is not None,
        GRAD=grad_a is not None,
        WEIGHTED=weight is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def keys_launch(
    sides: Sides,
    mask: Tensor | None,
    extents: Extents,
    stats: Tensor,
    grad_b: Tensor,
    scale_s: float,
    scale_t: float,
    shares: Tensor,
    other: Tensor | None = None,
    window: int | None = None,
) -> None:
    """Run the key kernel, which fills ``grad_b`` and its blocks' ``shares`` of the loss; a contiguous fp32 gradient
    ``other`` is added to ``grad_b``."""
    a_s, b_s, a_t, b_t = sides
    shape = shape_of((a_s, b_s), (a_t, b_t))
    config = lookup("grad_keys", a_s, a_t)
    blocks = shape.batch * shape.heads * cdiv(shape.length, config.block_n)
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    relation_kl_keys_kernel[(blocks,)](
        *sides,
        bits,
        *extents,
        stats,
        shares if other is None else other,
        shares,
        grad_b,
        *(stride for x in sides for stride in x.stride()[:3]),
        mask_b,
        mask_l,
        *grad_b.stride()[:3],
        shape.heads,
        shape.length,
        abs(scale_s) * LOG2E,
        abs(scale_t) * LOG2E,
        abs(scale_s),
        window,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **shape.constants,
        HAS_MASK=mask is not None,
        ADD=other is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _short_launch(
    config: Config,
    sides: Sides,
    mask: Tensor | None,
    weight: Tensor,
    extents: Extents,
    grad_a: Tensor,
    grad_b: Tensor,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """Run the kernel that visits whole heads; returns the heads' shares of the loss."""
    a_s, b_s, a_t, b_t = sides
    shape = shape_of((a_s, b_s), (a_t, b_t))
    heads = shape.batch * shape.heads
    sums = torch.empty(heads, dtype=torch.float32, device=a_s.device)
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    relation_kl_short_kernel[(short_programs(heads, config, a_s),)](
        *sides,
        bits,
        weight,
        *extents,
        sums,
        grad_a,
        grad_b,
        *(stride for x in sides for stride in x.stride()[:3]),
        mask_b,
        mask_l,
        *weight.stride(),
        *grad_a.stride()[:3],
        *grad_b.stride()[:3],
        shape.heads,
        heads,
        shape.length,
        (abs(scale_s) or TINY) * LOG2E,
        (abs(scale_t) or TINY) * LOG2E,
        scale_s,
        abs(scale_s),
        BLOCK_L=block_length(shape.length),
        **shape.constants,
        HAS_MASK=mask is not None,
        STREAM=config.num_stages > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return sums
