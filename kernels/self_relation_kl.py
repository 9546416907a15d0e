"""self_relation_kl where one program can own a head: one tile of scores serves rows and keys.

The scores of x with itself are symmetric, so dS and its transpose come from one tile, and their products with x go
into one gradient. Longer sequences run the kernels of ``relation_kl``, whose key kernel adds the rows' gradient:
there two score tiles with one exponential each cost less than one tile with an exponential for either role.
"""

import triton
import triton.language as tl

from .primitives import EXTENTS, dot, dot_add, half_scale, load_rows, operand, store_rows
from .relation_kl_short import head_ends, softmax_difference, weights_and_bias


@triton.jit
def _visit(
    head, x_s, x_t, mask, weight, extents, peak, sums, grad_x,
    xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, mask_b, mask_l, weight_b, weight_h, weight_l,
    gx_b, gx_h, gx_l, heads, L, scale_s, scale_t, grad_scale,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_L: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """All of one head."""
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    key_end, row_end = head_ends(extents + b * EXTENTS)
    used = tl.maximum(key_end, row_end)
    own_s = load_rows(x_s + b * xs_b + h * xs_h, 0, xs_l, used, D_S, BLOCK_L, PAD_S, True, UPCAST)
    own_t = load_rows(x_t + b * xt_b + h * xt_h, 0, xt_l, used, D_T, BLOCK_L, PAD_T, True, UPCAST)
    w, bias = weights_and_bias(
        weight + b * weight_b + h * weight_h, weight_l, row_end, mask + b * mask_b, mask_l, key_end,
        BLOCK_L, HAS_MASK,
    )  # fmt: skip
    weight_scale = half_scale(peak + b)
    kl, difference = softmax_difference(
        dot_add(own_s, tl.trans(own_s), bias, FP32_S), dot_add(own_t, tl.trans(own_t), bias, FP32_T),
        scale_s, scale_t, w, weight_scale,
    )  # fmt: skip
    tl.store(sums + head, tl.sum(tl.where(w != 0, w * kl, 0.0), 0))
    difference = operand(difference, own_s, FP32_S)
    grad = dot(difference, own_s, FP32_S)
    grad = dot_add(tl.trans(difference), own_s, grad, FP32_S) * (grad_scale / weight_scale)
    store_rows(grad_x + b * gx_b + h * gx_h, 0, gx_l, L, grad, D_S, BLOCK_L, PAD_S)


@triton.jit(do_not_specialize=["L", "heads", "total", "mask_b", "weight_b"])
def self_relation_kl_short_kernel(
    x_s, x_t, mask, weight, extents, peak, sums, grad_x,
    xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, mask_b, mask_l, weight_b, weight_h, weight_l,
    gx_b, gx_h, gx_l, heads, total, L, scale_s, scale_t, grad_scale,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_L: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Heads with L <= BLOCK_L: weighted KL in ``sums`` (B * H,), and the gradient of both roles.

    Arguments as in ``relation_kl_short_kernel``.
    """
    if STREAM:
        each = tl.cdiv(total, tl.num_programs(0))
        first = tl.program_id(0) * each
        for head in tl.range(first, tl.minimum(first + each, total)):
            _visit(
                head, x_s, x_t, mask, weight, extents, peak, sums, grad_x,
                xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, mask_b, mask_l, weight_b, weight_h, weight_l,
                gx_b, gx_h, gx_l, heads, L, scale_s, scale_t, grad_scale,
                D_S, D_T, BLOCK_L, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, HAS_MASK,
            )  # fmt: skip
    else:
        _visit(
            tl.program_id(0), x_s, x_t, mask, weight, extents, peak, sums, grad_x,
            xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, mask_b, mask_l, weight_b, weight_h, weight_l,
            gx_b, gx_h, gx_l, heads, L, scale_s, scale_t, grad_scale,
            D_S, D_T, BLOCK_L, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, HAS_MASK,
        )  # fmt: skip
