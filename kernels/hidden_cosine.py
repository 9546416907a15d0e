"""hidden_cosine: w (1 - cos(x, y)) of every row, x the student's state and y the teacher's, and its gradient if asked.

The gradient is -w / (|x| |y|) (y - (x.y / |x|^2) x): the part of y across x. Written so, it is exactly 0 where the two
rows are equal, whether or not the compiler contracts the product and the difference.
"""

import triton
import triton.language as tl

from .rows import multiple, weights_of


@triton.jit
def _inner(x, y, cols, mask):
    a = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(y + cols, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit(do_not_specialize=["n_rows"])
def hidden_cosine_kernel(
    student,  # (N, d)
    teacher,  # (N, d)
    grad,  # (N, d), or None: the loss alone
    row_weight,  # (N,)
    partials,  # (programs,), fp32
    n_rows,
    width,
    row_s,
    row_t,
    row_g,
    stride_w,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,  # divides d and the row strides
):
    """One program: ROWS rows; with WHOLE a row fits in COLS columns and is read once, else twice."""
    width = multiple(width, ALIGN)
    block = tl.program_id(0)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = weights_of(row_weight, stride_w, rows, n_rows)
    from_s = student + (rows * multiple(row_s, ALIGN))[:, None]
    from_t = teacher + (rows * multiple(row_t, ALIGN))[:, None]
    exists = (rows < n_rows)[:, None]
    reads = exists & (w != 0.0)[:, None]
    lanes = tl.arange(0, COLS)[None, :]
    if WHOLE:
        x, y = _inner(from_s, from_t, lanes, reads & (lanes < width))
        xx, yy, xy = tl.sum(x * x, 1), tl.sum(y * y, 1), tl.sum(x * y, 1)
    else:
        xx_lanes = tl.zeros((ROWS, COLS), tl.float32)
        yy_lanes = tl.zeros((ROWS, COLS), tl.float32)
        xy_lanes = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, width, COLS):
            x, y = _inner(from_s, from_t, start + lanes, reads & (start + lanes < width))
            xx_lanes += x * x
            yy_lanes += y * y
            xy_lanes += x * y
        xx, yy, xy = tl.sum(xx_lanes, 1), tl.sum(yy_lanes, 1), tl.sum(xy_lanes, 1)
    # Rounded roots and quotients: equal rows must have a cosine of exactly 1.
    norm = tl.sqrt_rn(tl.maximum(xx, eps) * tl.maximum(yy, eps))
    # Up to eps there is no direction: the cosine is 0 and has no gradient. NaN is not such a length.
    cosine = tl.where(xx <= eps, 0.0, tl.div_rn(xy, norm))
    tl.store(partials + block, tl.sum(w * (1.0 - cosine), 0))
    if grad is not None:
        along = tl.div_rn(xy, tl.maximum(xx, eps))[:, None]
        factor = tl.where(xx <= eps, 0.0, tl.div_rn(-w, norm))[:, None]
        to_g = grad + (rows * multiple(row_g, ALIGN))[:, None]
        kind = grad.dtype.element_ty
        if WHOLE:
            part = factor * (y - along * x)
            tl.store(to_g + lanes, part.to(kind), mask=exists & (lanes < width))
        else:
            for start in range(0, width, COLS):
                cols = start + lanes
                x, y = _inner(from_s, from_t, cols, reads & (cols < width))
                part = factor * (y - along * x)
                tl.store(to_g + cols, part.to(kind), mask=exists & (cols < width))
