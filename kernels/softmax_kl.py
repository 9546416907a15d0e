"""softmax_kl: row KL of two sides' logits and its gradient w (P_s - P_t) / T.

With maxima m, a = z - m, e = exp(a / T) and l = sum e, a row's value is

    KL = sum e_t (a_t - a_s) / (l_t T) + log(l_s / l_t)

The sum is over differences from the maxima, and the two log-sum-exps meet in one quotient before the logarithm: a shift
of one side's logits costs no digits, and equal sides give exactly 0. The gradient is w / (T l_t) (e_s l_t / l_s - e_t)
so that it is 0 there too: where a compiler contracts e_s / l_s - e_t / l_t, a rounding error remains.
"""

import triton
import triton.language as tl

from .rows import multiple, weights_of

# A finite stand-in for minus infinity: the difference of two of them is no NaN.
LOW = tl.constexpr(-8.5e37)


@triton.jit
def _logits(z, bias, cols, mask):
    """Logits in fp32, plus a bias where there is one; LOW where nothing is read."""
    if mask is None:
        x = tl.load(z + cols).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + cols).to(tl.float32)
    else:
        x = tl.load(z + cols, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
        # Not as what a masked load gives: that would be rounded to the logits' dtype, to infinity in fp16.
        x = tl.where(mask, x, LOW)
    return x


@triton.jit
def _terms(e_t, a_t, a_s):
    """Of the sum over classes; 0 where the teacher rules a class out, though both logits may be -inf there."""
    return tl.where(e_t > 0.0, e_t * (a_t - a_s), 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def softmax_kl_block_kernel(
    z_s,  # (N, C)
    z_t,  # (N, C)
    bias_s,  # (C,) or None
    bias_t,  # (C,) or None
    grad,  # (N, C), may be z_s itself; None for the value alone
    row_weight,  # (N,) or None, which counts every row once
    out,  # (N,), fp32: weighted KL
    n_rows,
    classes,
    row_s,
    row_t,
    row_g,
    stride_w,
    inverse_t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,  # divides C and the row strides
):
    """One program: ROWS whole rows in registers, COLS >= C."""
    classes = multiple(classes, ALIGN)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    w = weights_of(row_weight, stride_w, rows, n_rows)
    lanes = tl.arange(0, COLS)[None, :]
    inside = lanes < classes
    reads = (w != 0.0)[:, None] & inside
    scale = inverse_t * 1.4426950408889634
    s = _logits(z_s + (rows * multiple(row_s, ALIGN))[:, None], bias_s, lanes, reads)
    t = _logits(z_t + (rows * multiple(row_t, ALIGN))[:, None], bias_t, lanes, reads)
    a_s, a_t = s - tl.max(s, 1)[:, None], t - tl.max(t, 1)[:, None]
    e_s, e_t = tl.exp2(a_s * scale), tl.exp2(a_t * scale)
    l_s, l_t = tl.sum(e_s, 1), tl.sum(e_t, 1)
    mean = tl.div_rn(tl.sum(_terms(e_t, a_t, a_s), 1), l_t)
    kl = mean * inverse_t + tl.log(tl.div_rn(l_s, l_t))
    tl.store(out + rows, w * kl, mask=exists)
    if grad is not None:
        factor = tl.div_rn(w * inverse_t, l_t)[:, None]
        difference = factor * (e_s * tl.div_rn(l_t, l_s)[:, None] - e_t)
        to_g = grad + (rows * multiple(row_g, ALIGN))[:, None] + lanes
        tl.store(to_g, difference.to(grad.dtype.element_ty), mask=exists[:, None] & inside)


@triton.jit
def _block(
    z, bias, start, lanes, classes, WRAPS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr
):
    """WRAPS tiles of logits, each a vector for every thread.

    A tuple, since a third dimension invites a compiler to spread the wraps over the threads (Triton 3.6 does).
    """
    x = ()  # type: ignore[var-annotated]
    for i in tl.static_range(WRAPS):
        at = start + i * STEP + lanes
        # Triton knows sums of tuples, and no unpacking.
        x = x + (_logits(z, bias, at, (at < classes) if EDGE else None),)  # type: ignore # noqa: RUF005
    return x


@triton.jit
def _widest(x):
    """Largest of every thread's numbers."""
    most = tl.max(x[0], 1)
    for i in tl.static_range(1, len(x)):
        most = tl.maximum(most, tl.max(x[i], 1))
    return most


@triton.jit
def _step(s, t, m_s, m_t, l_s, l_t, total, scale):
    """Take a block of logits into the maxima and sums that every thread keeps for what it has read itself."""
    new_s, new_t = tl.maximum(m_s, _widest(s)), tl.maximum(m_t, _widest(t))
    total, l_s, l_t = _move(m_s, m_t, new_s, new_t, l_s, l_t, total, scale)
    for i in tl.static_range(len(s)):
        a_s, a_t = s[i] - new_s[:, None], t[i] - new_t[:, None]
        e_t = tl.exp2(a_t * scale)
        l_s += tl.sum(tl.exp2(a_s * scale), 1)
        l_t += tl.sum(e_t, 1)
        total += tl.sum(_terms(e_t, a_t, a_s), 1)
    return new_s, new_t, l_s, l_t, total


@triton.jit
def _move(m_s, m_t, new_s, new_t, l_s, l_t, total, scale):
    """Sums relative to new maxima; both of them move the origin of a_t - a_s."""
    fade_t = tl.exp2((m_t - new_t) * scale)
    total = fade_t * (total + ((m_t - new_t) - (m_s - new_s)) * l_t)
    return total, l_s * tl.exp2((m_s - new_s) * scale), l_t * fade_t


@triton.jit
def _difference(s, t, m_s, m_t, ratio, factor, scale):
    return factor * (tl.exp2((s - m_s) * scale) * ratio - tl.exp2((t - m_t) * scale))


@triton.jit(do_not_specialize=["n_rows"])
def softmax_kl_loop_kernel(
    z_s,  # (N, C)
    z_t,  # (N, C)
    bias_s,  # (C,) or None
    bias_t,  # (C,) or None
    grad,  # (N, C), may be z_s itself; None for the value alone
    row_weight,  # (N,) or None, which counts every row once
    out,  # (N,), fp32: weighted KL
    n_rows,
    classes,
    row_s,
    row_t,
    row_g,
    stride_w,
    inverse_t,
    WRAPS: tl.constexpr,
    LANES: tl.constexpr,  # threads of the program
    VEC: tl.constexpr,  # neighbouring logits that a thread reads at once
    ALIGN: tl.constexpr,  # divides the row strides
):
    """One program: one row, in one sweep for the value and a second one, out of the cache, for the gradient.

    Threads meet only once, behind the first sweep: a maximum of the whole block in every turn of the loop would cost a
    third of its instructions and two barriers.
    """
    row = tl.program_id(0).to(tl.int64)
    z_s += row * multiple(row_s, ALIGN)
    z_t += row * multiple(row_t, ALIGN)
    w = weights_of(row_weight, stride_w, row, n_rows)
    scale = inverse_t * 1.4426950408889634
    STEP: tl.constexpr = LANES * VEC
    COLS: tl.constexpr = WRAPS * STEP
    lanes = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    full = classes // COLS * COLS
    if w == 0.0:
        tl.store(out + row, 0.0)
        if grad is not None:
            to_g = grad + row * multiple(row_g, ALIGN)
            nothing = tl.zeros((LANES, VEC), grad.dtype.element_ty)
            for start in range(0, classes, STEP):
                tl.store(to_g + start + lanes, nothing, mask=start + lanes < classes)
    else:
        m_s = tl.full((LANES,), LOW, tl.float32)
        m_t = tl.full((LANES,), LOW, tl.float32)
        l_s = tl.zeros((LANES,), tl.float32)
        l_t = tl.zeros((LANES,), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, full, COLS):
            s = _block(z_s, bias_s, start, lanes, classes, WRAPS, STEP, False)
            t = _block(z_t, bias_t, start, lanes, classes, WRAPS, STEP, False)
            m_s, m_t, l_s, l_t, total = _step(s, t, m_s, m_t, l_s, l_t, total, scale)
        if full < classes:
            s = _block(z_s, bias_s, full, lanes, classes, WRAPS, STEP, True)
            t = _block(z_t, bias_t, full, lanes, classes, WRAPS, STEP, True)
            m_s, m_t, l_s, l_t, total = _step(s, t, m_s, m_t, l_s, l_t, total, scale)
        top_s, top_t = tl.max(m_s, 0), tl.max(m_t, 0)
        total, l_s, l_t = _move(m_s, m_t, top_s, top_t, l_s, l_t, total, scale)
        sum_s, sum_t = tl.sum(l_s, 0), tl.sum(l_t, 0)
        mean = tl.div_rn(tl.sum(total, 0), sum_t)
        tl.store(out + row, w * (mean * inverse_t + tl.log(tl.div_rn(sum_s, sum_t))))
        if grad is not None:
            ratio, factor = tl.div_rn(sum_t, sum_s), tl.div_rn(w * inverse_t, sum_t)
            to_g = grad + row * multiple(row_g, ALIGN)
            kind = grad.dtype.element_ty
            for start in range(0, full, COLS):
                s = _block(z_s, bias_s, start, lanes, classes, WRAPS, STEP, False)
                t = _block(z_t, bias_t, start, lanes, classes, WRAPS, STEP, False)
                for i in tl.static_range(WRAPS):
                    d = _difference(s[i], t[i], top_s, top_t, ratio, factor, scale)
                    tl.store(to_g + start + i * STEP + lanes, d.to(kind))
            if full < classes:
                s = _block(z_s, bias_s, full, lanes, classes, WRAPS, STEP, True)
                t = _block(z_t, bias_t, full, lanes, classes, WRAPS, STEP, True)
                for i in tl.static_range(WRAPS):
                    d = _difference(s[i], t[i], top_s, top_t, ratio, factor, scale)
                    at = full + i * STEP + lanes
                    tl.store(to_g + at, d.to(kind), mask=at < classes)
