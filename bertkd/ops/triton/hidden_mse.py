"""Launchers of hidden_mse and hidden_cosine: one visit to every state gives the loss, and the gradient if asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertkd.kernels.hidden_cosine import hidden_cosine_kernel
from bertkd.kernels.hidden_mse import hidden_mse_kernel
from bertkd.ops.tensors import guard, laid_out_like, unit_stride
from bertkd.ops.triton.sizes import cdiv, power_of_2
from bertkd.ops.triton.states import alignment, grouped
from bertkd.reference import COSINE_EPS

# Elements of a tile: 16 a thread, two loads of 16 bytes for 16-bit states.
TILE = 2048
# A row up to here stays in registers between hidden_cosine's sums and its gradient.
WHOLE_WIDTH = 2048


def mse_config(width: int) -> dict[str, Any]:
    """Tile of hidden_mse: of 512, 256 and 128 columns those that leave the fewest lanes idle."""
    cols = power_of_2(width)
    if cols > 128:
        cols = min((512, 256, 128), key=lambda c: cdiv(width, c) * c)
    return {"ROWS": max(1, TILE // cols), "COLS": cols, "num_warps": 4, "num_stages": 1}


def cosine_config(width: int) -> dict[str, Any]:
    """Tile of hidden_cosine: whole rows where they fit."""
    whole = width <= WHOLE_WIDTH
    cols = power_of_2(width) if whole else TILE // 2
    rows = max(1, TILE // cols)
    return {"ROWS": rows, "COLS": cols, "WHOLE": whole, "num_warps": 4, "num_stages": 1}


def hidden_mse_fwd_bwd(
    row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``sum_k sum_i w_i |h_s[k]_i - h_t[k]_i|^2`` over states of (N, d), and its gradients."""
    students = [unit_stride(x) for x in h_s]
    grads = [torch.empty_like(x) for x in students]
    loss = _mse(row_weight, students, h_t, grads)
    return loss, [laid_out_like(x, grad) for x, grad in zip(h_s, grads, strict=True)]


def hidden_mse_sum(row_weight: Tensor, h_s: Sequence[Tensor], h_t: Sequence[Tensor]) -> Tensor:
    """The same sum alone: nothing is written."""
    return _mse(row_weight, [unit_stride(x) for x in h_s], h_t, None)


def _mse(
    row_weight: Tensor,
    students: Sequence[Tensor],
    h_t: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
) -> Tensor:
    """The sum over students with unit stride; fills ``grads``."""
    teachers = [unit_stride(x) for x in h_t]
    n_rows, width = students[0].shape
    config = mse_config(width)
    blocks = cdiv(n_rows, config["ROWS"])
    partials = torch.empty((len(students), blocks), dtype=torch.float32, device=row_weight.device)
    sides = (students, teachers) if grads is None else (students, teachers, grads)
    done = 0
    with guard(row_weight):
        # States share a launch if they have one dtype and one row stride a side.
        for group in grouped(
            [tuple((x.dtype, x.stride(0)) for x in pair) for pair in zip(*sides, strict=True)]
        ):
            s, t, *written = (tuple(side[i] for i in group) for side in sides)
            g = written[0] if written else None
            hidden_mse_kernel[(blocks, len(group))](
                s,
                t,
                g,
                row_weight,
                partials[done:],
                n_rows,
                width,
                s[0].stride(0),
                t[0].stride(0),
                0 if g is None else g[0].stride(0),
                row_weight.stride(0),
                ALIGN=alignment(width, s[0], t[0], None if g is None else g[0]),
                **config,
                enable_fp_fusion=True,
            )
            done += len(group)
    # One sum of a fixed shape: no atomics, the same bits every time.
    return partials.sum()


def hidden_cosine_fwd_bwd(row_weight: Tensor, h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_i w_i (1 - cos(h_s_i, h_t_i))`` over (N, d), and its gradient."""
    student = unit_stride(h_s)
    grad = torch.empty_like(student)
    return _cosine(row_weight, student, h_t, grad), laid_out_like(h_s, grad)


def hidden_cosine_sum(row_weight: Tensor, h_s: Tensor, h_t: Tensor) -> Tensor:
    """The same sum alone: nothing is written."""
    return _cosine(row_weight, unit_stride(h_s), h_t, None)


def _cosine(row_weight: Tensor, student: Tensor, h_t: Tensor, grad: Tensor | None) -> Tensor:
    """The sum over a student with unit stride; fills ``grad``."""
    teacher = unit_stride(h_t)
    n_rows, width = student.shape
    config = cosine_config(width)
    blocks = cdiv(n_rows, config["ROWS"])
    partials = torch.empty((blocks,), dtype=torch.float32, device=student.device)
    with guard(student):
        hidden_cosine_kernel[(blocks,)](
            student,
            teacher,
            grad,
            row_weight,
            partials,
            n_rows,
            width,
            student.stride(0),
            teacher.stride(0),
            0 if grad is None else grad.stride(0),
            row_weight.stride(0),
            COSINE_EPS,
            ALIGN=alignment(width, student, teacher, grad),
            **config,
            enable_fp_fusion=True,
        )
    return partials.sum()
