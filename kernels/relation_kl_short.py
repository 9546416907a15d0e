"""relation_kl where one program can own a head: loss and both gradients in one visit, every input read once.

Whole rows of scores are there, so both softmaxes are exact at once and each pair costs two exponentials in all. What
is left is memory traffic, and pads cause none.
"""

import triton
import triton.language as tl

from .primitives import (
    HALF_RANGE,
    LN2,
    LOW,
    dot,
    load_rows,
    operand,
    quotient,
    real_keys,
    store_rows,
)


@triton.jit
def softmax_difference(s, t, scale_s, scale_t, bias, w, weight_scale):
    """Row KL of two tiles of raw scores, and weight * (P_s - P_t) times ``weight_scale``; ``bias`` is LOW at pad keys.

    A pad's score drowns in LOW on both sides alike, so that its logarithms differ by 0 and its probabilities are 0.
    """
    s = s * scale_s + bias[None, :]
    t = t * scale_t + bias[None, :]
    s = s - tl.max(s, 1)[:, None]
    t = t - tl.max(t, 1)[:, None]
    p_s, p_t = tl.exp2(s), tl.exp2(t)
    l_s, l_t = tl.sum(p_s, 1), tl.sum(p_t, 1)
    ratio = quotient(l_s, l_t)
    kl = (tl.sum(p_t * (t - s), 1) / l_t + tl.log2(ratio)) * LN2
    # Subtracted before anything is multiplied in: equal networks must give exactly 0.
    return kl, (p_s - p_t * ratio[:, None]) * (w * weight_scale / l_s)[:, None]


@triton.jit
def head_extents(mask, weight, mask_l, weight_l, L, BLOCK_L: tl.constexpr, HAS_MASK: tl.constexpr):
    """LOW at pad keys (BLOCK_L,), ends of real keys and of weighted rows, and the largest |weight|.

    Without a real key the weights count as 0: nothing is attended to.
    """
    at = tl.arange(0, BLOCK_L)
    keep = real_keys(mask, 0, mask_l, L, BLOCK_L, HAS_MASK)
    w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < L, other=0.0)
    key_end = tl.max(tl.where(keep, at + 1, 0), 0)
    row_end = tl.max(tl.where(w != 0, at + 1, 0), 0)
    return tl.where(keep, 0.0, LOW), key_end, row_end, tl.maximum(tl.max(tl.abs(w), 0), 1e-30)


@triton.jit(do_not_specialize=["L", "heads", "mask_b", "weight_b"])
def relation_kl_short_kernel(
    a_s, b_s, a_t, b_t, mask, weight, sums, grad_a, grad_b,
    as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
    mask_b, mask_l, weight_b, weight_h, weight_l, ga_b, ga_h, ga_l, gb_b, gb_h, gb_l, heads, L,
    scale_s, scale_t, scale_a, scale_b,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_L: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One program a head with L <= BLOCK_L: its weighted KL in ``sums`` (B * H,), and both gradients.

    Other arguments as in ``relation_kl_rows_kernel``; ``scale_a`` and ``scale_b`` are factors on the gradients.
    """
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    weight += b * weight_b + h * weight_h
    bias, key_end, row_end, peak = head_extents(
        mask + b * mask_b, weight, mask_l, weight_l, L, BLOCK_L, HAS_MASK
    )
    x_t = load_rows(a_t + b * at_b + h * at_h, 0, at_l, row_end, D_T, BLOCK_L, PAD_T, True, UPCAST)
    keys_t = load_rows(
        b_t + b * bt_b + h * bt_h, 0, bt_l, key_end, D_T, BLOCK_L, PAD_T, True, UPCAST
    )
    x_s = load_rows(a_s + b * as_b + h * as_h, 0, as_l, row_end, D_S, BLOCK_L, PAD_S, True, UPCAST)
    keys_s = load_rows(
        b_s + b * bs_b + h * bs_h, 0, bs_l, key_end, D_S, BLOCK_L, PAD_S, True, UPCAST
    )
    at = tl.arange(0, BLOCK_L)
    w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < row_end, other=0.0)
    weight_scale = HALF_RANGE / peak
    kl, difference = softmax_difference(
        dot(x_s, tl.trans(keys_s), FP32_S), dot(x_t, tl.trans(keys_t), FP32_T),
        scale_s, scale_t, bias, w, weight_scale,
    )  # fmt: skip
    tl.store(sums + head, tl.sum(tl.where(w != 0, w * kl, 0.0), 0))
    difference = operand(difference, keys_s, FP32_S)
    grad = dot(difference, keys_s, FP32_S) * (scale_a / weight_scale)
    store_rows(grad_a + b * ga_b + h * ga_h, 0, ga_l, L, grad, D_S, BLOCK_L, PAD_S)
    grad = dot(tl.trans(difference), x_s, FP32_S) * (scale_b / weight_scale)
    store_rows(grad_b + b * gb_b + h * gb_h, 0, gb_l, L, grad, D_S, BLOCK_L, PAD_S)
