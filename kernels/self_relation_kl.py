"""self_relation_kl where one program can own a head: one tile of scores serves rows and keys.

The scores of x with itself are symmetric, so dS and its transpose come from one tile, and their products with x go
into one gradient. Longer sequences run the kernels of ``relation_kl``, whose key kernel adds the rows' gradient:
there two score tiles with one exponential each cost less than one tile with an exponential for either role.
"""

import triton
import triton.language as tl

from .primitives import HALF_RANGE, dot, dot_add, load_rows, operand, store_rows
from .relation_kl_short import head_extents, softmax_difference


@triton.jit(do_not_specialize=["L", "heads", "mask_b", "weight_b"])
def self_relation_kl_short_kernel(
    x_s, x_t, mask, weight, sums, grad_x,
    xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, mask_b, mask_l, weight_b, weight_h, weight_l,
    gx_b, gx_h, gx_l, heads, L, scale_s, scale_t, grad_scale,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_L: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One program a head with L <= BLOCK_L: its weighted KL in ``sums`` (B * H,), and the gradient of both roles.

    Arguments as in ``relation_kl_short_kernel``.
    """
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    weight += b * weight_b + h * weight_h
    bias, key_end, row_end, peak = head_extents(
        mask + b * mask_b, weight, mask_l, weight_l, L, BLOCK_L, HAS_MASK
    )
    used = tl.maximum(key_end, row_end)
    own_s = load_rows(x_s + b * xs_b + h * xs_h, 0, xs_l, used, D_S, BLOCK_L, PAD_S, True, UPCAST)
    own_t = load_rows(x_t + b * xt_b + h * xt_h, 0, xt_l, used, D_T, BLOCK_L, PAD_T, True, UPCAST)
    at = tl.arange(0, BLOCK_L)
    w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < row_end, other=0.0)
    weight_scale = HALF_RANGE / peak
    kl, difference = softmax_difference(
        dot(own_s, tl.trans(own_s), FP32_S), dot(own_t, tl.trans(own_t), FP32_T),
        scale_s, scale_t, bias, w, weight_scale,
    )  # fmt: skip
    tl.store(sums + head, tl.sum(tl.where(w != 0, w * kl, 0.0), 0))
    difference = operand(difference, own_s, FP32_S)
    grad = dot(difference, own_s, FP32_S)
    grad = dot_add(tl.trans(difference), own_s, grad, FP32_S) * (grad_scale / weight_scale)
    store_rows(grad_x + b * gx_b + h * gx_h, 0, gx_l, L, grad, D_S, BLOCK_L, PAD_S)
