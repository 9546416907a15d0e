"""attention_mse: Gram matrices for long sequences, tiles of score differences for short ones. No atomics.

Gram form: with A = [c_s q_s, -c_t q_t] and B = [k_s, k_t] the difference of the scores is A_i . B_j, so the sum of its
squares is <A^T W A, B^T B>, and the gradients are 2 W A (B^T B) and 2 B (A^T W A): no L x L work. Written like that the
sum cancels as the networks approach each other. With equal head widths A = [c_s q_s - c_t q_t, c_t q_t] and
B = [k_s, k_s - k_t] give the same difference from terms that are small themselves. Either way a factor has two halves,
and a symmetric Gram matrix three blocks. Factors and products are fp32: a difference rounded to 16 bits would show.
"""

import triton
import triton.language as tl

from .primitives import (
    EXTENTS,
    KEY_END,
    KEY_FIRST,
    ROW_END,
    ROW_FIRST,
    dot,
    load_rows,
    places,
    reach,
    real_keys,
    store_rows,
    within,
)


@triton.jit
def _product(a, b, sums, THREE: tl.constexpr):
    """``sums + a @ b`` of fp32 operands; with THREE as three products of tf32 halves (error near fp32's)."""
    if THREE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32x3")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32")


@triton.jit
def _factor(
    x_s, x_t, start, xs_l, xt_l, stop, mask, mask_l, scale_s, ratio,
    KEYS: tl.constexpr, EQUAL: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    BLOCK: tl.constexpr, PAD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Both halves of A (or with KEYS of B) for BLOCK positions, (BLOCK, PAD) each; 0 from ``stop`` on and at pad keys.

    c_s x_s - c_t x_t is written as (x_s - (c_t / c_s) x_t) c_s: the multiply-add that a compiler makes of it is then
    exactly 0 where both sides are equal.
    """
    s = load_rows(x_s, start, xs_l, stop, D_S, BLOCK, PAD, True, False).to(tl.float32)
    t = load_rows(x_t, start, xt_l, stop, D_T, BLOCK, PAD, True, False).to(tl.float32)
    if KEYS:
        if HAS_MASK:
            real = real_keys(mask, start, mask_l, stop, BLOCK, HAS_MASK)[:, None]
            s, t = tl.where(real, s, 0.0), tl.where(real, t, 0.0)
        if EQUAL:
            t = s - t
    elif EQUAL:
        s = (s - t * ratio) * scale_s
        t = t * (ratio * scale_s)
    else:
        s, t = s * scale_s, t * (-ratio * scale_s)
    return s, t


@triton.jit
def _gram_block(
    x_s, x_t, xs_l, xt_l, mask, mask_l, weight, weight_l, first, end, scale_s, ratio, block, gram,
    KEYS: tl.constexpr, EQUAL: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    BLOCK: tl.constexpr, PAD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Add the positions ``first ... end`` to one block of a Gram matrix; rows count with their weight."""
    for start in tl.range(first, end, BLOCK):
        one, two = _factor(
            x_s, x_t, start, xs_l, xt_l, end, mask, mask_l, scale_s, ratio,
            KEYS, EQUAL, D_S, D_T, BLOCK, PAD, HAS_MASK,
        )  # fmt: skip
        left, right = tl.where(block == 2, two, one), tl.where(block == 0, one, two)
        if not KEYS:
            at = start + tl.arange(0, BLOCK)
            w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < end, other=0.0)
            left = left * w[:, None]
        gram = _product(tl.trans(left), right, gram, True)
    return gram


@triton.jit(do_not_specialize=["L", "heads", "mask_b", "weight_b", "splits"])
def attention_mse_gram_kernel(
    q_s, k_s, q_t, k_t, mask, weight, extents, grams,
    qs_b, qs_h, qs_l, ks_b, ks_h, ks_l, qt_b, qt_h, qt_l, kt_b, kt_h, kt_l,
    mask_b, mask_l, weight_b, weight_h, weight_l, heads, splits, L, scale_s, ratio,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
    EQUAL: tl.constexpr, HAS_MASK: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """One program a head, side, block and share of the positions: blocks 11, 12, 22 of A^T W A and B^T B.

    Args:
        grams: (splits, B * H, SIDES, 3, PAD, PAD) fp32; B^T B is side 0, with SIDES = 2 A^T W A is side 1.
        ratio: c_t / c_s.
    """
    block = tl.program_id(0) % 3
    side = tl.program_id(0) // 3 % SIDES
    split = tl.program_id(0) // (3 * SIDES) % splits
    head = tl.program_id(0) // (3 * SIDES * splits)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    extents += b * EXTENTS
    share = tl.cdiv(tl.cdiv(L, splits), BLOCK) * BLOCK
    gram = tl.zeros((PAD, PAD), tl.float32)
    if side == 0:
        first = tl.maximum(tl.load(extents + KEY_FIRST), split * share)
        end = tl.minimum(tl.load(extents + KEY_END), (split + 1) * share)
        gram = _gram_block(
            k_s + b * ks_b + h * ks_h, k_t + b * kt_b + h * kt_h, ks_l, kt_l,
            mask + b * mask_b, mask_l, weight, 0, first, end, scale_s, ratio, block, gram,
            True, EQUAL, D_S, D_T, BLOCK, PAD, HAS_MASK,
        )  # fmt: skip
    else:
        first = tl.maximum(tl.load(extents + ROW_FIRST), split * share)
        end = tl.minimum(tl.load(extents + ROW_END), (split + 1) * share)
        gram = _gram_block(
            q_s + b * qs_b + h * qs_h, q_t + b * qt_b + h * qt_h, qs_l, qt_l,
            mask, 0, weight + b * weight_b + h * weight_h, weight_l, first, end, scale_s, ratio,
            block, gram, False, EQUAL, D_S, D_T, BLOCK, PAD, HAS_MASK,
        )  # fmt: skip
    total = tl.num_programs(0) // (3 * SIDES * splits)
    place = ((split * total + head).to(tl.int64) * SIDES + side) * 3 + block
    store_rows(grams + place * PAD * PAD, 0, PAD, PAD, gram, PAD, PAD, PAD)


@triton.jit(do_not_specialize=["L", "heads", "mask_b", "weight_b"])
def attention_mse_gram_grad_kernel(
    x_s, x_t, mask, weight, extents, grams, grad,
    xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, mask_b, mask_l, weight_b, weight_h, weight_l,
    grad_b, grad_h, grad_l, heads, L, scale_s, ratio,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
    EQUAL: tl.constexpr, HAS_MASK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program a block of a head: the gradient of k_s (KEYS) or q_s, from the other side's Gram matrix."""
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    extents += b * EXTENTS
    row_end, key_end = tl.load(extents + ROW_END), tl.load(extents + KEY_END)
    stop = key_end if KEYS else row_end
    result = tl.zeros((BLOCK, PAD), tl.float32)
    if (start < stop) & (row_end > 0) & (key_end > 0):
        one, two = _factor(
            x_s + b * xs_b + h * xs_h, x_t + b * xt_b + h * xt_h, start, xs_l, xt_l, stop,
            mask + b * mask_b, mask_l, scale_s, ratio,
            KEYS, EQUAL, D_S, D_T, BLOCK, PAD, HAS_MASK,
        )  # fmt: skip
        grams += ((head * 2 + (1 if KEYS else 0)) * 3).to(tl.int64) * PAD * PAD
        first = load_rows(grams, 0, PAD, PAD, PAD, PAD, PAD, False, False)
        mixed = load_rows(grams + PAD * PAD, 0, PAD, PAD, PAD, PAD, PAD, False, False)
        second = tl.trans(mixed)
        if KEYS and EQUAL:
            # k_s stands in both halves of B, so both halves' gradients reach it.
            first += mixed
            second += load_rows(grams + 2 * PAD * PAD, 0, PAD, PAD, PAD, PAD, PAD, False, False)
        result = _product(one, first, result, True)
        result = _product(two, second, result, True) * 2.0
        if not KEYS:
            at = start + tl.arange(0, BLOCK)
            weight += b * weight_b + h * weight_h
            w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < L, other=0.0)
            result = tl.where(w[:, None] != 0, result * (w * scale_s)[:, None], 0.0)
    store_rows(grad + b * grad_b + h * grad_h, start, grad_l, L, result, D_S, BLOCK, PAD)


@triton.jit(do_not_specialize=["L", "heads"])
def attention_mse_gram_rows_kernel(
    q_s, q_t, grams, rows, qs_b, qs_h, qs_l, qt_b, qt_h, qt_l, heads, L, scale_s, ratio,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
    EQUAL: tl.constexpr,
):  # fmt: skip
    """One program a block of rows of a head: A_i (B^T B) A_i into ``rows`` (B, H, L)."""
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    one, two = _factor(
        q_s + b * qs_b + h * qs_h, q_t + b * qt_b + h * qt_h, start, qs_l, qt_l, L, q_s, 0,
        scale_s, ratio, False, EQUAL, D_S, D_T, BLOCK, PAD, False,
    )  # fmt: skip
    grams += (head * 3).to(tl.int64) * PAD * PAD
    empty = tl.zeros((BLOCK, PAD), tl.float32)
    gram = load_rows(grams, 0, PAD, PAD, PAD, PAD, PAD, False, False)
    total = tl.sum(_product(one, gram, empty, True) * one, 1)
    gram = load_rows(grams + PAD * PAD, 0, PAD, PAD, PAD, PAD, PAD, False, False)
    total += 2.0 * tl.sum(_product(one, gram, empty, True) * two, 1)
    gram = load_rows(grams + 2 * PAD * PAD, 0, PAD, PAD, PAD, PAD, PAD, False, False)
    total += tl.sum(_product(two, gram, empty, True) * two, 1)
    at = start + tl.arange(0, BLOCK)
    tl.store(rows + head.to(tl.int64) * L + at, total, mask=at < L)


@triton.jit
def _counts(factor, start, stride, stop, SIZE: tl.constexpr, GIVEN: tl.constexpr):
    """Weights of rows or flags of keys as fp32, 0 from ``stop`` on; 1 where nothing is given."""
    at = start + tl.arange(0, SIZE)
    if GIVEN:
        return tl.load(factor + at.to(tl.int64) * stride, mask=at < stop, other=0).to(tl.float32)
    else:
        return tl.where(at < stop, 1.0, 0.0)


@triton.jit(do_not_specialize=["L", "heads", "own_b", "other_b", "window"])
def attention_mse_pairs_kernel(
    x_s, x_t, y_s, y_t, own, other, extents, rows, grad,
    xs_b, xs_h, xs_l, xt_b, xt_h, xt_l, ys_b, ys_h, ys_l, yt_b, yt_h, yt_l,
    own_b, own_h, own_l, other_b, other_h, other_l, grad_b, grad_h, grad_l, heads, L,
    scale_s, ratio, window,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAD_S: tl.constexpr, PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr,
    UPCAST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, KEYS: tl.constexpr,
    SUM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """One program a block of positions x of a head against all y: squared differences of scores, and x_s's gradient.

    x are the queries and y the keys, or with KEYS the other way round: the loss is symmetric in them but for the
    factors, weights of rows and flags of real keys.

    Args:
        own, other: factors of x and of y (B, H, L); where OWN or OTHER is false, 1.
        rows: with SUM (B * H * blocks,) weighted sums; else (B, H, L) sums over y of every x; without KEYS only.
        grad: like x_s; written with GRAD.
        ratio: c_t / c_s.
        window: how far from an x the y of a pair may be, or None.
    """
    blocks = tl.cdiv(L, BLOCK_M)
    head = tl.program_id(0) // blocks
    x_start = (tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    extents += b * EXTENTS
    first = tl.load(extents + (ROW_FIRST if KEYS else KEY_FIRST))
    end = tl.load(extents + (ROW_END if KEYS else KEY_END))
    x_end = tl.load(extents + (KEY_END if KEYS else ROW_END))
    if window is not None:
        first, end = reach(first, end, x_start, x_start + BLOCK_M, window)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    gradient = tl.zeros((BLOCK_M, PAD_S if GRAD else 1), tl.float32)
    mine = _counts(own + b * own_b + h * own_h, x_start, own_l, L, BLOCK_M, OWN)
    if x_start < x_end:
        x_s += b * xs_b + h * xs_h
        x_t += b * xt_b + h * xt_h
        y_s += b * ys_b + h * ys_h
        y_t += b * yt_b + h * yt_h
        other += b * other_b + h * other_h
        own_s = load_rows(x_s, x_start, xs_l, x_end, D_S, BLOCK_M, PAD_S, True, UPCAST)
        own_t = load_rows(x_t, x_start, xt_l, x_end, D_T, BLOCK_M, PAD_T, True, UPCAST)
        for start in tl.range(first, end, BLOCK_N):
            tile_s = load_rows(y_s, start, ys_l, end, D_S, BLOCK_N, PAD_S, True, UPCAST)
            tile_t = load_rows(y_t, start, yt_l, end, D_T, BLOCK_N, PAD_T, True, UPCAST)
            counts = _counts(other, start, other_l, end, BLOCK_N, OTHER)
            s = dot(own_s, tl.trans(tile_s), FP32_S)
            t = dot(own_t, tl.trans(tile_t), FP32_T)
            # As in _factor: exactly 0 where both sides are equal, however the compiler contracts it.
            difference = (s - t * ratio) * scale_s
            taken = counts[None, :] != 0
            if window is not None:
                y = places(counts != 0, start, BLOCK_N)
                taken = within(x_start + tl.arange(0, BLOCK_M), y, window)
            weighted = tl.where(taken, difference * counts[None, :], 0.0)
            if not KEYS:
                squares += tl.sum(weighted * difference, 1)
            if GRAD:
                # Scores have no bound, so not rounded to float16 but to tf32, which has float16's precision.
                gradient = _product(weighted, tile_s, gradient, FP32_S)
    if GRAD:
        gradient = gradient * (mine * (2.0 * scale_s))[:, None]
        gradient = tl.where(mine[:, None] != 0, gradient, 0.0)
        store_rows(
            grad + b * grad_b + h * grad_h, x_start, grad_l, L, gradient, D_S, BLOCK_M, PAD_S
        )
    if not KEYS:
        if SUM:
            tl.store(rows + tl.program_id(0), tl.sum(tl.where(mine != 0, mine * squares, 0.0), 0))
        else:
            at = x_start + tl.arange(0, BLOCK_M)
            tl.store(rows + head.to(tl.int64) * L + at, squares, mask=at < L)
