"""relation_kl for any length: rows in one pass over the keys, then keys in one pass over the rows. No atomics.

The row kernel keeps running maxima m and sums l of both softmaxes. With t = T - m_t and s = S - m_s (scores in base
2, shifted), KL = sum 2^t (t - s) / l_t - log l_t + log l_s. The gradient of a row is

    sum_j (P_s - P_t)_j b_j = 1 / l_s * sum_j (2^s_j - r 2^t_j) b_j      with r = l_s / l_t,

and r is known only after the last key. So two sums run along: D = sum (2^s - r 2^t) b with the r known so far, and
E = sum 2^t b. When r moves to r', D moves by (r - r') E. Every difference is formed in fp32 and rounded once, and E
enters with the factor r - r' only, which is small where the networks agree: nothing cancels, the error stays
relative to P_s - P_t, and equal networks give exactly 0. That is two exponentials a pair for value, both sums and the
first gradient; the key kernel needs two more, and neither maxima nor masks.

With a window a block visits only the tiles that it reaches. A row without a key in them meets LOW on both sides alike,
so that r is 1 and every difference 0; what it has summed decays to nothing with the first key that it does find.
"""

import triton
import triton.language as tl

from .primitives import (
    EXTENTS,
    KEY_DENSE,
    KEY_END,
    KEY_FIRST,
    LN2,
    LOW,
    ROW_END,
    ROW_FIRST,
    dot,
    dot_add,
    half_scale,
    load_rows,
    operand,
    places,
    quotient,
    reach,
    real_keys,
    store_rows,
    within,
)


@triton.jit
def _visit_keys(
    a_s, a_t, b_s, b_t, bs_l, bt_l, mask, mask_l, start, stop, at, window, scale_s, scale_t,
    m_s, l_s, m_t, l_t, gap, ratio, difference, teacher,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_N: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    HAS_MASK: tl.constexpr, GRAD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running sums after it. EDGE tiles may hold pads and end before BLOCK_N keys.

    Rows ``at`` take the keys that are at most ``window`` away, where that is not None; all tiles are EDGE then.
    """
    keys_s = load_rows(b_s, start, bs_l, stop, D_S, BLOCK_N, PAD_S, EDGE, UPCAST)
    keys_t = load_rows(b_t, start, bt_l, stop, D_T, BLOCK_N, PAD_T, EDGE, UPCAST)
    s = dot(a_s, tl.trans(keys_s), FP32_S)
    t = dot(a_t, tl.trans(keys_t), FP32_T)
    if EDGE:
        # A pad's score drowns in LOW on both sides alike: its logarithms differ by 0, its probabilities are 0.
        keep = real_keys(mask, start, mask_l, stop, BLOCK_N, HAS_MASK)
        if window is None:
            bias = tl.where(keep, 0.0, LOW)[None, :]
        else:
            bias = tl.where(within(at, places(keep, start, BLOCK_N), window), 0.0, LOW)
        s, t = s * scale_s + bias, t * scale_t + bias
        new_s, new_t = tl.maximum(m_s, tl.max(s, 1)), tl.maximum(m_t, tl.max(t, 1))
        s, t = s - new_s[:, None], t - new_t[:, None]
    else:
        new_s = tl.maximum(m_s, tl.max(s, 1) * scale_s)
        new_t = tl.maximum(m_t, tl.max(t, 1) * scale_t)
        s, t = s * scale_s - new_s[:, None], t * scale_t - new_t[:, None]
    p_s, p_t = tl.exp2(s), tl.exp2(t)
    step_s, step_t = m_s - new_s, m_t - new_t
    decay_s, decay_t = tl.exp2(step_s), tl.exp2(step_t)
    if not GRAD:
        gap = (gap + l_t * (step_t - step_s)) * decay_t + tl.sum(p_t * (t - s), 1)
    l_s = l_s * decay_s + tl.sum(p_s, 1)
    l_t = l_t * decay_t + tl.sum(p_t, 1)
    if GRAD:
        new_ratio = quotient(l_s, l_t)
        turn = ratio * decay_s - new_ratio * decay_t
        difference = difference * decay_s[:, None] + teacher * turn[:, None]
        teacher = teacher * decay_t[:, None]
        ratio = new_ratio
        p_s = p_s - p_t * ratio[:, None]
        difference = dot_add(operand(p_s, keys_s, FP32_S), keys_s, difference, FP32_S)
        teacher = dot_add(operand(p_t, keys_s, FP32_S), keys_s, teacher, FP32_S)
    return new_s, l_s, new_t, l_t, gap, ratio, difference, teacher


@triton.jit(do_not_specialize=["L", "heads", "mask_b", "weight_b", "window"])
def relation_kl_rows_kernel(
    a_s, b_s, a_t, b_t, mask, weight, extents, peak, rows, stats, grad_a,
    as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
    mask_b, mask_l, weight_b, weight_h, weight_l, ga_b, ga_h, ga_l, heads, L,
    scale_s, scale_t, grad_scale, window,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAD_S: tl.constexpr, PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr,
    UPCAST: tl.constexpr, HAS_MASK: tl.constexpr, GRAD: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program a block of rows of a head: their KL; with weights also what the key kernel needs, and the gradient.

    Args:
        extents, peak: see ``sequence_extents``.
        rows: (B, H, L) KL of every row; with WEIGHTED (B * H * blocks,) weighted sums of the blocks; with GRAD these
            hold log l_s - log l_t only, and the key kernel writes the rest.
        stats: (4, B, H, L) m_s, m_t, l_s / l_t and weight / l_s (moved into float16's range); written with WEIGHTED.
        grad_a: like a_s; written with GRAD.
        scale_s, scale_t: factors on the scores times log2(e).
        grad_scale: the student's factor.
        window: how far away the keys of a row may be, or None.
    """
    blocks = tl.cdiv(L, BLOCK_M)
    head = tl.program_id(0) // blocks
    row_start = (tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    at = row_start + tl.arange(0, BLOCK_M)
    extents += b * EXTENTS
    key_first, key_end = tl.load(extents + KEY_FIRST), tl.load(extents + KEY_END)
    key_dense = tl.load(extents + KEY_DENSE)
    row_first, row_end = tl.load(extents + ROW_FIRST), tl.load(extents + ROW_END)
    if window is not None:
        key_first, key_end = reach(key_first, key_end, row_start, row_start + BLOCK_M, window)
    grad_a += b * ga_b + h * ga_h
    busy = (key_end > key_first) & (row_start < row_end) & (row_start + BLOCK_M > row_first)
    if busy:
        mask += b * mask_b
        a_s += b * as_b + h * as_h
        a_t += b * at_b + h * at_h
        b_s += b * bs_b + h * bs_h
        b_t += b * bt_b + h * bt_h
        x_s = load_rows(a_s, row_start, as_l, row_end, D_S, BLOCK_M, PAD_S, True, UPCAST)
        x_t = load_rows(a_t, row_start, at_l, row_end, D_T, BLOCK_M, PAD_T, True, UPCAST)
        m_s = tl.full((BLOCK_M,), LOW, tl.float32)
        m_t = tl.full((BLOCK_M,), LOW, tl.float32)
        l_s = tl.zeros((BLOCK_M,), tl.float32)
        l_t = tl.zeros((BLOCK_M,), tl.float32)
        gap = tl.zeros((BLOCK_M,), tl.float32)
        ratio = tl.full((BLOCK_M,), 1.0, tl.float32)
        difference = tl.zeros((BLOCK_M, PAD_S if GRAD else 1), tl.float32)
        teacher = tl.zeros((BLOCK_M, PAD_S if GRAD else 1), tl.float32)
        full_end = key_first + (key_dense - key_first) // BLOCK_N * BLOCK_N
        if window is not None:
            # No tile is full, but of keys without holes none needs the mask, the last one included.
            full_end = key_end if key_dense >= key_end else tl.maximum(full_end, key_first)
        for start in tl.range(key_first, full_end, BLOCK_N):
            m_s, l_s, m_t, l_t, gap, ratio, difference, teacher = _visit_keys(
                x_s, x_t, b_s, b_t, bs_l, bt_l, mask, mask_l, start, key_end, at, window, scale_s, scale_t,
                m_s, l_s, m_t, l_t, gap, ratio, difference, teacher,
                D_S, D_T, BLOCK_N, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, False, GRAD, window is not None,
            )  # fmt: skip
        for start in tl.range(full_end, key_end, BLOCK_N, num_stages=1):
            m_s, l_s, m_t, l_t, gap, ratio, difference, teacher = _visit_keys(
                x_s, x_t, b_s, b_t, bs_l, bt_l, mask, mask_l, start, key_end, at, window, scale_s, scale_t,
                m_s, l_s, m_t, l_t, gap, ratio, difference, teacher,
                D_S, D_T, BLOCK_N, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, HAS_MASK, GRAD, True,
            )  # fmt: skip
        # With gradients the rows' gaps are the key kernel's: its exponentials leave room for them, these do not.
        kl = (gap / l_t + tl.log2(quotient(l_s, l_t))) * LN2
        if WEIGHTED:
            weight += b * weight_b + h * weight_h
            w = tl.load(weight + at.to(tl.int64) * weight_l, mask=at < L, other=0.0)
            tl.store(rows + tl.program_id(0), tl.sum(tl.where(w != 0, w * kl, 0.0), 0))
            # Pivots and sums, not log-sum-exps: the rounding of a pivot cancels between numerator and sum.
            to = stats + head.to(tl.int64) * L + at
            plane = (tl.num_programs(0) // blocks).to(tl.int64) * L
            tl.store(to, m_s, mask=at < L)
            tl.store(to + plane, m_t, mask=at < L)
            tl.store(to + 2 * plane, quotient(l_s, l_t), mask=at < L)
            tl.store(to + 3 * plane, w * half_scale(peak + b) / l_s, mask=at < L)
            if GRAD:
                grad = tl.where(w[:, None] != 0, difference * (w * grad_scale / l_s)[:, None], 0.0)
                store_rows(grad_a, row_start, ga_l, L, grad, D_S, BLOCK_M, PAD_S)
        else:
            tl.store(rows + head.to(tl.int64) * L + at, kl, mask=at < L)
    elif WEIGHTED:
        tl.store(rows + tl.program_id(0), 0.0)
        if GRAD:
            grad = tl.zeros((BLOCK_M, PAD_S), tl.float32)
            store_rows(grad_a, row_start, ga_l, L, grad, D_S, BLOCK_M, PAD_S)
    else:
        tl.store(rows + head.to(tl.int64) * L + at, tl.zeros((BLOCK_M,), tl.float32), mask=at < L)


@triton.jit
def load_stats(stats, plane, start, stop, SIZE: tl.constexpr, EDGE: tl.constexpr):
    """m_s, m_t, l_s / l_t and scaled weight / l_s of rows; rows from ``stop`` on have weight 0."""
    at = start + tl.arange(0, SIZE)
    stats += at
    if EDGE:
        m_s = tl.load(stats, mask=at < stop, other=0.0)
        m_t = tl.load(stats + plane, mask=at < stop, other=0.0)
        ratio = tl.load(stats + 2 * plane, mask=at < stop, other=0.0)
        factor = tl.load(stats + 3 * plane, mask=at < stop, other=0.0)
    else:
        m_s, m_t = tl.load(stats), tl.load(stats + plane)
        ratio, factor = tl.load(stats + 2 * plane), tl.load(stats + 3 * plane)
    return m_s, m_t, ratio, factor


@triton.jit
def _visit_rows(
    keys_s, keys_t, bias, keys, window, a_s, a_t, as_l, at_l, stats, plane, start, stop, scale_s, scale_t,
    grad, gap,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_M: tl.constexpr, PAD_S: tl.constexpr,
    PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr, UPCAST: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of rows. Not transposed: statistics of rows take a register a row, of columns one a column."""
    x_s = load_rows(a_s, start, as_l, stop, D_S, BLOCK_M, PAD_S, EDGE, UPCAST)
    x_t = load_rows(a_t, start, at_l, stop, D_T, BLOCK_M, PAD_T, EDGE, UPCAST)
    m_s, m_t, ratio, factor = load_stats(stats, plane, start, stop, BLOCK_M, EDGE)
    s = dot(x_s, keys_s, FP32_S)
    t = dot(x_t, keys_t, FP32_T)
    s = s * scale_s - m_s[:, None]
    t = t * scale_t - m_t[:, None]
    if window is not None:
        keep = within(start + tl.arange(0, BLOCK_M), keys, window)
        s, t = tl.where(keep, s, LOW), tl.where(keep, t, LOW)
    elif EDGE:
        s, t = s + bias[None, :], t + bias[None, :]
    p_s, p_t = tl.exp2(s), tl.exp2(t)
    gap += tl.sum(p_t * (t - s), 1) * ratio * factor
    difference = (p_s - p_t * ratio[:, None]) * factor[:, None]
    return dot_add(tl.trans(operand(difference, x_s, FP32_S)), x_s, grad, FP32_S), gap


@triton.jit(do_not_specialize=["L", "heads", "mask_b", "window"])
def relation_kl_keys_kernel(
    a_s, b_s, a_t, b_t, mask, extents, peak, stats, other, sums, grad_b,
    as_b, as_h, as_l, bs_b, bs_h, bs_l, at_b, at_h, at_l, bt_b, bt_h, bt_l,
    mask_b, mask_l, gb_b, gb_h, gb_l, heads, L, scale_s, scale_t, grad_scale, window,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAD_S: tl.constexpr, PAD_T: tl.constexpr, FP32_S: tl.constexpr, FP32_T: tl.constexpr,
    UPCAST: tl.constexpr, HAS_MASK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program a block of BLOCK_N keys of a head, both softmaxes' sums known: grad_b = dS^T a_s c.

    One exponential a side and pair, no maxima. ``sums`` (B * H * blocks,) receives the weighted sum over the block of
    2^t (t - s) / l_t. With ADD the gradient in the other role, ``other`` (B, H, L, D_s) in fp32, is added: a relation
    of x with itself has one gradient, rounded once. Other arguments as in the row kernel, whose ``stats`` it reads.
    """
    blocks = tl.cdiv(L, BLOCK_N)
    head = tl.program_id(0) // blocks
    key_start = (tl.program_id(0) % blocks) * BLOCK_N
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    extents += b * EXTENTS
    key_first, key_end = tl.load(extents + KEY_FIRST), tl.load(extents + KEY_END)
    key_dense = tl.load(extents + KEY_DENSE)
    row_first, row_end = tl.load(extents + ROW_FIRST), tl.load(extents + ROW_END)
    if window is not None:
        # From real keys on, not from the block's first: of rows that reach none nobody wrote statistics.
        reached_first = tl.maximum(key_start, key_first)
        reached_end = tl.minimum(key_start + BLOCK_N, key_end)
        row_first, row_end = reach(row_first, row_end, reached_first, reached_end, window)
    grad = tl.zeros((BLOCK_N, PAD_S), tl.float32)
    loss = 0.0
    busy = (row_end > row_first) & (key_start < key_end) & (key_start + BLOCK_N > key_first)
    if busy:
        a_s += b * as_b + h * as_h
        a_t += b * at_b + h * at_h
        b_s += b * bs_b + h * bs_h
        b_t += b * bt_b + h * bt_h
        stats += head.to(tl.int64) * L
        plane = (tl.num_programs(0) // blocks).to(tl.int64) * L
        # Transposed once: inside the loop it would be copied to shared memory again and again.
        keys_s = tl.trans(
            load_rows(b_s, key_start, bs_l, key_end, D_S, BLOCK_N, PAD_S, True, UPCAST)
        )
        keys_t = tl.trans(
            load_rows(b_t, key_start, bt_l, key_end, D_T, BLOCK_N, PAD_T, True, UPCAST)
        )
        real = real_keys(mask + b * mask_b, key_start, mask_l, L, BLOCK_N, HAS_MASK)
        bias, keys = tl.where(real, 0.0, LOW), places(real, key_start, BLOCK_N)
        gap = tl.zeros((BLOCK_M,), tl.float32)
        # Only a block without pads has rows that need no bias.
        full_end = row_first
        if (key_start >= key_first) & (key_start + BLOCK_N <= key_dense):
            full_end = row_first + (row_end - row_first) // BLOCK_M * BLOCK_M
        if window is not None:
            # Any tile may lie at the edge of a window, where pads are left out with what is too far.
            full_end = row_end
        for start in tl.range(row_first, full_end, BLOCK_M):
            grad, gap = _visit_rows(
                keys_s, keys_t, bias, keys, window, a_s, a_t, as_l, at_l, stats, plane, start, row_end,
                scale_s, scale_t, grad, gap,
                D_S, D_T, BLOCK_M, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, window is not None,
            )  # fmt: skip
        for start in tl.range(full_end, row_end, BLOCK_M, num_stages=1):
            grad, gap = _visit_rows(
                keys_s, keys_t, bias, keys, window, a_s, a_t, as_l, at_l, stats, plane, start, row_end,
                scale_s, scale_t, grad, gap,
                D_S, D_T, BLOCK_M, PAD_S, PAD_T, FP32_S, FP32_T, UPCAST, True,
            )  # fmt: skip
        unit = 1.0 / half_scale(peak + b)
        loss = tl.sum(gap, 0) * (unit * LN2)
        grad = grad * (unit * grad_scale)
    tl.store(sums + tl.program_id(0), loss)
    if ADD:
        other += head.to(tl.int64) * L * D_S
        grad += load_rows(other, key_start, D_S, L, D_S, BLOCK_N, PAD_S, True, False)
    store_rows(grad_b + b * gb_b + h * gb_h, key_start, gb_l, L, grad, D_S, BLOCK_N, PAD_S)
