"""Launchers of the projected hidden-state losses: a GEMM with all the rest in its epilogue, then the vendor's GEMMs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertkd.kernels.hidden_proj_mse import hidden_proj_mse_kernel
from bertkd.ops.tensors import bias_gradient, guard, laid_out_like, unit_stride
from bertkd.ops.triton import interpreting
from bertkd.ops.triton.sizes import cdiv
from bertkd.ops.triton.states import (
    alignment,
    one_layout,
    operand_dtype,
    product,
)

# From as many rows on projections in half precision have larger tiles.
MANY_ROWS = 4096
_ONE_WIDTH = "its kernel takes states of one width a side"


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why ``op`` cannot run on ``tensors``, or None: any layout and dtypes, one width a side for combine."""
    if op == "hidden_combine_mse":
        matrices = [x for x in tensors if x.dim() == 2]
        for i, weight in enumerate(matrices):
            sides = [[x.shape[1] for x in side] for side in (matrices[:i], matrices[i + 1 :])]
            if tuple(weight.shape) == (sum(sides[0]), sum(sides[1])):
                return None if all(len(set(side)) == 1 for side in sides) else _ONE_WIDTH
    return None


def size_of_form(tensors: Sequence[Tensor]) -> int | None:
    """Fewest rows with the tiles of many, where the tensors have as many; None for any below."""
    return MANY_ROWS if tensors[0].shape[0] >= MANY_ROWS else None


def proj_config(n_rows: int, k_width: int, dtype: torch.dtype, align: int) -> dict[str, Any]:
    """Tile of the projection; few rows get small tiles, so that there are enough of them."""
    if align < 4:
        # Read element by element, whose addresses take the registers of a larger tile.
        rows, cols, depth, warps, stages = 64, 32, 32, 4, 2
    elif dtype == torch.float32:
        rows, cols, depth, warps, stages = 64, 64, 32, 4, 2
    elif n_rows >= MANY_ROWS:
        rows, cols, depth, warps, stages = 128, 128, 64, 8, 3
    else:
        rows, cols, depth, warps, stages = 64, 64, 64, 4, 3
    return {
        "ROWS": rows,
        "COLS": cols,
        "DEPTH": depth,
        "EVEN": k_width % depth == 0,
        "ALIGN": align,
        "num_warps": warps,
        "num_stages": stages,
    }


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: exactly, unless the user allowed TF32, as torch's products do.

    Not "tf32x3": matrix units round their sums down, and errors must stay within twice those of eager.
    """
    if dtype != torch.float32:
        return "ieee"
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # PyTorch refuses the old question once its newer settings, one for each backend, were used.
        exact = torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    return "ieee" if exact else "tf32"


class _Residual(NamedTuple):
    """What one launch leaves: the weighted loss, G = sign 2 w R per target, and the bias gradient or nothing (0,)."""

    loss: Tensor
    outputs: list[Tensor]
    bias_sum: Tensor


def _residual(
    row_weight: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    targets: Sequence[Tensor],
    sign: float,
    out_dtype: torch.dtype | None,
) -> _Residual:
    """R = sum_k inputs_k W_k^T + b - targets of (N, k) and (N, m) states of one layout a side.

    Without ``out_dtype`` the loss alone: ``outputs`` is empty and there is no bias gradient.
    """
    n_rows, k_width = inputs[0].shape
    m_width = targets[0].shape[1]
    device = weight.device
    compute = operand_dtype(*inputs, weight)
    outputs = []
    if out_dtype is not None:
        outputs = [torch.empty((n_rows, m_width), dtype=out_dtype, device=device) for _ in targets]
    align = alignment(math.gcd(k_width, m_width), inputs[0], weight, targets[0], *outputs[:1])
    config = proj_config(n_rows, k_width, compute, align)
    row_blocks = cdiv(n_rows, config["ROWS"])
    programs = row_blocks * cdiv(m_width, config["COLS"]) * len(targets)
    losses = torch.empty((programs,), dtype=torch.float32, device=device)
    bias_sums = None
    if bias is not None:
        bias = unit_stride(bias)
        if outputs:
            shape = (row_blocks, weight.shape[0])
            bias_sums = torch.empty(shape, dtype=torch.float32, device=device)
    with guard(weight):
        hidden_proj_mse_kernel[(programs,)](
            tuple(inputs),
            weight,
            bias,
            tuple(targets),
            tuple(outputs) or None,
            row_weight,
            losses,
            bias_sums,
            n_rows,
            k_width,
            m_width,
            inputs[0].stride(0),
            weight.stride(0),
            targets[0].stride(0),
            outputs[0].stride(0) if outputs else 0,
            row_weight.stride(0),
            SIGN=sign,
            # The interpreter multiplies bfloat16 wrongly.
            UPCAST=compute == torch.float32 or interpreting(),
            PRECISION=precision(compute),
            **config,
            enable_fp_fusion=True,
        )
    bias_sum = weight.new_empty(0) if bias_sums is None else bias_sums.sum(0)
    return _Residual(losses.sum(), outputs, bias_sum)


def hidden_proj_mse_fwd_bwd(
    row_weight: Tensor, h_s: Tensor, weight: Tensor, bias: Tensor | None, h_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum_i w_i |h_s_i W^T + b - h_t_i|^2`` over (N, d_s), (d_t, d_s), (N, d_t), and its gradients."""
    hidden, matrix = unit_stride(h_s), unit_stride(weight)
    compute = operand_dtype(hidden, matrix)
    result = _residual(row_weight, [hidden], matrix, bias, [unit_stride(h_t)], 1.0, compute)
    (g,) = result.outputs
    # fp32 out of the products: in half precision the library may round the parts of a split sum.
    grad_h = laid_out_like(h_s, product(g, matrix.to(compute)))
    grad_w = laid_out_like(weight, product(g.T, hidden.to(compute)))
    return result.loss, grad_h, grad_w, bias_gradient(result.bias_sum, bias, weight)


def hidden_proj_mse_sum(
    row_weight: Tensor, h_s: Tensor, weight: Tensor, bias: Tensor | None, h_t: Tensor
) -> Tensor:
    """The same sum alone: one GEMM, of which nothing is stored."""
    hidden, matrix = unit_stride(h_s), unit_stride(weight)
    return _residual(row_weight, [hidden], matrix, bias, [unit_stride(h_t)], 1.0, None).loss


def hidden_combine_mse_fwd_bwd(
    row_weight: Tensor,
    h_s: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    h_t: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """``sum_i w_i |cat(h_s)_i - (cat(h_t)_i W^T + b)|^2``, and its gradients; nothing is concatenated.

    All teacher states enter one accumulator inside the kernel, so the target of (N, sum of d_s) never exists.
    """
    students, teachers, matrix = one_layout(h_s), one_layout(h_t), unit_stride(weight)
    compute = operand_dtype(*teachers, matrix)
    # G is at once the students' gradient and an operand for the weight's: rounded once if both have one dtype.
    dtypes = {x.dtype for x in h_s} | {compute}
    out_dtype = compute if len(dtypes) == 1 else torch.float32
    result = _residual(row_weight, teachers, matrix, bias, students, -1.0, out_dtype)
    grad_w = torch.empty_like(weight)
    width_s, width_t = students[0].shape[1], teachers[0].shape[1]
    for j, g in enumerate(result.outputs):
        operand = g.to(compute).T
        for k, teacher in enumerate(teachers):
            part = grad_w[j * width_s : (j + 1) * width_s, k * width_t : (k + 1) * width_t]
            part.copy_(product(operand, teacher.to(compute)).neg_())
    grads = [laid_out_like(x, g) for x, g in zip(h_s, result.outputs, strict=True)]
    return result.loss, grads, grad_w, bias_gradient(result.bias_sum, bias, weight)


def hidden_combine_mse_sum(
    row_weight: Tensor,
    h_s: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    h_t: Sequence[Tensor],
) -> Tensor:
    """The same sum alone: one GEMM, of which nothing is stored."""
    students, teachers, matrix = one_layout(h_s), one_layout(h_t), unit_stride(weight)
    return _residual(row_weight, teachers, matrix, bias, students, -1.0, None).loss
