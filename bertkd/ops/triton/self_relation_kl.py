"""Launches the kernels for the relation of a tensor with itself: one gradient, the sum of both roles."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.kernels.self_relation_kl import self_relation_kl_short_kernel
from bertkd.ops.tensors import guard, laid_out_like, unit_stride
from bertkd.ops.triton.attention import (
    LOG2E,
    Extents,
    block_length,
    extents_of,
    mask_arguments,
    refusal,
    shape_of,
)
from bertkd.ops.triton.config import TINY, Config, short_config, short_programs
from bertkd.ops.triton.relation_kl import positive_sides, relation_kl_rows, tiled_launches

__all__ = ["refusal", "self_relation_kl_fwd_bwd", "self_relation_kl_rows"]


def self_relation_kl_rows(
    x_s: Tensor, x_t: Tensor, mask: Tensor | None, scale_s: float, scale_t: float
) -> Tensor:
    """``relation_kl_rows`` of x with itself, (B, H, L)."""
    return relation_kl_rows(x_s, x_s, x_t, x_t, mask, scale_s, scale_t)


def self_relation_kl_fwd_bwd(
    row_weight: Tensor,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` of x with itself and its gradient, both roles summed in fp32 and rounded once."""
    if row_weight.numel() == 0:
        return row_weight.sum(), torch.empty_like(x_s)
    # A negative factor would flip one of two equal tensors, which only the general form takes.
    config = short_config("self_short", x_s, x_t) if min(scale_s, scale_t) >= 0 else None
    with guard(x_s):
        extents = extents_of(mask, row_weight, x_s)
        if config is not None:
            student, teacher = unit_stride(x_s), unit_stride(x_t)
            grad = torch.empty_like(student)
            loss = _short_launch(
                config, student, teacher, mask, row_weight, extents, grad, scale_s, scale_t
            ).sum()
            return loss, laid_out_like(x_s, grad)
        sides = positive_sides(x_s, x_s, x_t, x_t, scale_s, scale_t)
        rows_grad = torch.empty(x_s.shape, dtype=torch.float32, device=x_s.device)
        grad = torch.empty_like(sides[1])
        grads = rows_grad, grad
        loss = tiled_launches(
            sides, mask, row_weight, extents, grads, scale_s, scale_t, summed=True
        )
        return loss, laid_out_like(x_s, grad)


def _short_launch(
    config: Config,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    extents: Extents,
    grad: Tensor,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """Run the kernel that visits whole heads; returns the heads' shares of the loss."""
    shape = shape_of((x_s,), (x_t,))
    heads = shape.batch * shape.heads
    sums = torch.empty(heads, dtype=torch.float32, device=x_s.device)
    bits, mask_b, mask_l = mask_arguments(mask, extents.table)
    self_relation_kl_short_kernel[(short_programs(heads, config, x_s),)](
        x_s,
        x_t,
        bits,
        weight,
        *extents,
        sums,
        grad,
        *x_s.stride()[:3],
        *x_t.stride()[:3],
        mask_b,
        mask_l,
        *weight.stride(),
        *grad.stride()[:3],
        shape.heads,
        heads,
        shape.length,
        (scale_s or TINY) * LOG2E,
        (scale_t or TINY) * LOG2E,
        scale_s,
        BLOCK_L=block_length(shape.length),
        **shape.constants,
        HAS_MASK=mask is not None,
        STREAM=config.num_stages > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return sums
