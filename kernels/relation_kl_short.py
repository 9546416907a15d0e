"""relation_kl where one program holds a head: loss and both gradients in one visit, every input read once.

Whole rows of scores are there, so both softmaxes are exact at once and each pair costs two exponentials in all. What
is left is memory traffic, and pads cause none.

Two heads' scores of 128 tokens do not fit into the registers of a multiprocessor, so that nobody else could work while
a head is waited for. With STREAM a program visits several heads in a pipelined loop, which reads the next head's tiles
during this one's arithmetic. Smaller heads leave room for other programs, and those wait more cheaply.
"""

import triton
import triton.language as tl

from .primitives import (
    EXTENTS,
    KEY_END,
    LN2,
    LOW,
    ROW_END,
    dot,
    dot_add,
    half_scale,
    load_rows,
    operand,
    quotient,
    real_keys,
    store_rows,
)


@triton.jit
def softmax_difference(s, t, scale_s, scale_t, w, weight_scale):
    """Row KL of two tiles of raw scores, LOW at pad keys, and weight * (P_s - P_t) times ``weight_scale``.

    At a pad the logarithms differ by something finite, and both probabilities are 0.
    """
    s = s * scale_s - (tl.max(s, 1) * scale_s)[:, None]
    t = t * scale_t - (tl.max(t, 1) * scale_t)[:, None]
    p_s, p_t = tl.exp2(s), tl.exp2(t)
    l_s, l_t = tl.sum(p_s, 1), tl.sum(p_t, 1)
    ratio = quotient(l_s, l_t)
    kl = (tl.sum(p_t * (t - s), 1) / l_t + tl.log2(ratio)) * LN2
    # Subtracted before anything is multiplied in: equal networks must give exactly 0.
    return kl, (p_s - p_t * ratio[:, None]) * (w * weight_scale / l_s)[:, None]


@triton.jit
def head_ends(extents):
    """Ends of the real keys and of the rows that count; no row counts where there is no key to attend to."""
    key_end = tl.load(extents + KEY_END)
    return key_end, tl.where(key_end > 0, tl.load(extents + ROW_END), 0)


@triton.jit
def weights_and_bias(
    weight, weight_l, row_end, mask, mask_l, key_end, BLOCK_L: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Row weights (BLOCK_L,), and LOW at pad keys (BLOCK_L, BLOCK_L), from which the products of scores start.

    Added afterwards it would stay in registers meanwhile.
    """
    at = tl.arange(0, BLOCK_L)
    w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < row_end, other=0.0)
    # Without any real key all count, in rows that do not: a maximum of LOW would leave its own rounding, and NaN.
    real = real_keys(mask, 0, mask_l, key_end, BLOCK_L, HAS_MASK) | (key_end == 0)
    bias = tl.where(real, 0.0, LOW)
    return w, tl.broadcast_to(bias[None, :], (BLOCK_L, BLOCK_L))


@triton.jit
def _visit(
    head, a_s, b_s, a_t, b_t, mask, weight, extents, peak, sums, grad_a, grad_b,
    as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
    mask_b, mask_l, weight_b, weight_h, weight_l, ga_b, ga_h, ga_l, gb_b, gb_h, gb_l, heads, L,
    scale_s, scale_t, scale_a, scale_b,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_L: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """All of one head."""
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    key_end, row_end = head_ends(extents + b * EXTENTS)
    x_t = load_rows(a_t + b * at_b + h * at_h, 0, at_l, row_end, D_T, BLOCK_L, PAD_T, True, UPCAST)
    keys_t = load_rows(
        b_t + b * bt_b + h * bt_h, 0, bt_l, key_end, D_T, BLOCK_L, PAD_T, True, UPCAST
    )
    x_s = load_rows(a_s + b * as_b + h * as_h, 0, as_l, row_end, D_S, BLOCK_L, PAD_S, True, UPCAST)
    keys_s = load_rows(
        b_s + b * bs_b + h * bs_h, 0, bs_l, key_end, D_S, BLOCK_L, PAD_S, True, UPCAST
    )
    w, bias = weights_and_bias(
        weight + b * weight_b + h * weight_h, weight_l, row_end, mask + b * mask_b, mask_l, key_end,
        BLOCK_L, HAS_MASK,
    )  # fmt: skip
    weight_scale = half_scale(peak + b)
    kl, difference = softmax_difference(
        dot_add(x_s, tl.trans(keys_s), bias, FP32_S), dot_add(x_t, tl.trans(keys_t), bias, FP32_T),
        scale_s, scale_t, w, weight_scale,
    )  # fmt: skip
    tl.store(sums + head, tl.sum(tl.where(w != 0, w * kl, 0.0), 0))
    difference = operand(difference, keys_s, FP32_S)
    grad = dot(difference, keys_s, FP32_S) * (scale_a / weight_scale)
    store_rows(grad_a + b * ga_b + h * ga_h, 0, ga_l, L, grad, D_S, BLOCK_L, PAD_S)
    grad = dot(tl.trans(difference), x_s, FP32_S) * (scale_b / weight_scale)
    store_rows(grad_b + b * gb_b + h * gb_h, 0, gb_l, L, grad, D_S, BLOCK_L, PAD_S)


@triton.jit(do_not_specialize=["L", "heads", "total", "mask_b", "weight_b"])
def relation_kl_short_kernel(
    a_s, b_s, a_t, b_t, mask, weight, extents, peak, sums, grad_a, grad_b,
    as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
    mask_b, mask_l, weight_b, weight_h, weight_l, ga_b, ga_h, ga_l, gb_b, gb_h, gb_l, heads, total, L,
    scale_s, scale_t, scale_a, scale_b,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_L: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Heads with L <= BLOCK_L: weighted KL in ``sums`` (B * H,), and both gradients.

    With STREAM any number of programs shares the ``total`` = B * H heads; without there is one for each. ``scale_a``
    and ``scale_b`` are factors on the gradients. Other arguments as in ``relation_kl_rows_kernel``; factors on the
    scores must not be 0, which would let pads through.
    """
    if STREAM:
        each = tl.cdiv(total, tl.num_programs(0))
        first = tl.program_id(0) * each
        for head in tl.range(first, tl.minimum(first + each, total)):
            _visit(
                head, a_s, b_s, a_t, b_t, mask, weight, extents, peak, sums, grad_a, grad_b,
                as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
                mask_b, mask_l, weight_b, weight_h, weight_l, ga_b, ga_h, ga_l, gb_b, gb_h, gb_l, heads, L,
                scale_s, scale_t, scale_a, scale_b,
                D_S, D_T, BLOCK_L, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, HAS_MASK,
            )  # fmt: skip
    else:
        _visit(
            tl.program_id(0), a_s, b_s, a_t, b_t, mask, weight, extents, peak, sums, grad_a, grad_b,
            as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
            mask_b, mask_l, weight_b, weight_h, weight_l, ga_b, ga_h, ga_l, gb_b, gb_h, gb_l, heads, L,
            scale_s, scale_t, scale_a, scale_b,
            D_S, D_T, BLOCK_L, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, HAS_MASK,
        )  # fmt: skip
