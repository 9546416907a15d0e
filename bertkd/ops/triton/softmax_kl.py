"""Launchers of softmax_kl: whole rows in registers for few classes, a loop over each row for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertkd.kernels.softmax_kl import softmax_kl_block_kernel, softmax_kl_loop_kernel
from bertkd.ops.tensors import guard, laid_out_like, unit_stride
from bertkd.ops.triton.sizes import cdiv, power_of_2
from bertkd.ops.triton.states import alignment

# Up to here a thread holds at most 32 logits of either side.
BLOCK_CLASSES = 8192
# Classes that a program visits at once, and its warps by the bytes of a logit. Large programs, so that the rows that
# are visited at the same time stay in the cache until their second sweep.
LOOP_COLS = 8192
LOOP_WARPS = {2: 16, 4: 32}


def block_config(classes: int, align: int) -> dict[str, Any]:
    """Tile of the form that holds whole rows: 2048 logits of a side for small rows, one row else."""
    cols = power_of_2(classes)
    rows = min(64, max(1, 2048 // cols))
    warps = 4 if cols <= 2048 else 8
    return {"ROWS": rows, "COLS": cols, "ALIGN": align, "num_warps": warps, "num_stages": 1}


def loop_config(align: int, *dtypes: torch.dtype) -> dict[str, Any]:
    """Block of the form that runs along a row; a thread reads up to 16 bytes of either side at once."""
    size = max(dtype.itemsize for dtype in dtypes)
    lanes = 32 * LOOP_WARPS[size]
    vec = min(align, 16 // size)
    return {
        "WRAPS": LOOP_COLS // (lanes * vec),
        "LANES": lanes,
        "VEC": vec,
        "ALIGN": align,
        "num_warps": LOOP_WARPS[size],
        "num_stages": 1,
    }


def row_kl(
    z_s: Tensor,
    z_t: Tensor,
    temperature: float,
    *,
    row_weight: Tensor | None = None,
    grad: Tensor | None = None,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weighted KL of every row (N,) of logits (N, C) with unit stride along C, and the gradient into ``grad``.

    ``grad`` may be ``z_s``; without ``row_weight`` every row counts once; a bias (C,) is added to its logits. The
    result goes to ``out`` where that is given.
    """
    n_rows, classes = z_s.shape
    if out is None:
        out = torch.empty((n_rows,), dtype=torch.float32, device=z_s.device)
    arguments = (
        z_s,
        z_t,
        bias_s,
        bias_t,
        grad,
        row_weight,
        out,
        n_rows,
        classes,
        z_s.stride(0),
        z_t.stride(0),
        0 if grad is None else grad.stride(0),
        0 if row_weight is None else row_weight.stride(0),
        1.0 / temperature,
    )
    with guard(z_s):
        if classes <= BLOCK_CLASSES:
            config = block_config(classes, alignment(classes, z_s, z_t, grad))
            grid = (cdiv(n_rows, config["ROWS"]),)
            softmax_kl_block_kernel[grid](*arguments, **config, enable_fp_fusion=True)
        else:
            config = loop_config(alignment(0, z_s, z_t, grad), z_s.dtype, z_t.dtype)
            softmax_kl_loop_kernel[(n_rows,)](*arguments, **config, enable_fp_fusion=True)
    return out


def softmax_kl_rows(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)) of every row: (N, C) -> (N,)."""
    return row_kl(unit_stride(z_s), unit_stride(z_t), temperature)


def softmax_kl_fwd_bwd(
    row_weight: Tensor, z_s: Tensor, z_t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradient ``row_weight (P_s - P_t) / T``."""
    student = unit_stride(z_s)
    grad = torch.empty_like(student)
    rows = row_kl(student, unit_stride(z_t), temperature, row_weight=row_weight, grad=grad)
    return rows.sum(), laid_out_like(z_s, grad)
