"""hidden_mse: w |h_s - h_t|^2 of every row of several states and, if asked for, its gradient 2 w (h_s - h_t)."""

import triton
import triton.language as tl

from .rows import multiple, select, weights_of


@triton.jit(do_not_specialize=["n_rows"])
def hidden_mse_kernel(
    students,  # tuple of (N, d)
    teachers,  # tuple of (N, d)
    grads,  # tuple of (N, d), or None: the loss alone
    row_weight,  # (N,)
    partials,  # (states, programs), fp32
    n_rows,
    width,
    row_s,
    row_t,
    row_g,
    stride_w,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,  # divides d and the row strides
):
    """One program: ROWS rows of one state. Grid: (row blocks, states)."""
    width = multiple(width, ALIGN)
    block, state = tl.program_id(0), tl.program_id(1)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = weights_of(row_weight, stride_w, rows, n_rows)
    from_s = select(students, state) + (rows * multiple(row_s, ALIGN))[:, None]
    from_t = select(teachers, state) + (rows * multiple(row_t, ALIGN))[:, None]
    if grads is not None:
        to_g = select(grads, state) + (rows * multiple(row_g, ALIGN))[:, None]
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        cols = (start + tl.arange(0, COLS))[None, :]
        exists = (rows < n_rows)[:, None] & (cols < width)
        reads = exists & (w != 0.0)[:, None]
        s = tl.load(from_s + cols, mask=reads, other=0.0).to(tl.float32)
        t = tl.load(from_t + cols, mask=reads, other=0.0).to(tl.float32)
        residual = s - t
        squares += residual * residual
        if grads is not None:
            grad = (2.0 * w)[:, None] * residual
            tl.store(to_g + cols, grad.to(grads[0].dtype.element_ty), mask=exists)
    loss = tl.sum(tl.sum(squares, 1) * w, 0)
    tl.store(partials + state * tl.num_programs(0) + block, loss)
