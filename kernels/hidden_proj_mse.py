"""hidden_proj_mse and hidden_combine_mse: R = sum_k X_k W_k^T + b - Y in a GEMM whose epilogue makes everything else.

Of R only what the gradients need is stored, once: G = SIGN 2 w R, rounded to the dtype of the two GEMMs that follow.
The weighted sum of squares and the sums of the bias gradient leave as one number, and one row, per program.
"""

import triton
import triton.language as tl

from .rows import multiple, select, weights_of


@triton.jit(do_not_specialize=["n_rows"])
def hidden_proj_mse_kernel(
    inputs,  # tuple of X (N, k)
    weight,  # (targets * m, inputs * k)
    bias,  # (targets * m,) or None
    targets,  # tuple of Y (N, m)
    outputs,  # tuple of G (N, m), or None: the loss alone
    row_weight,  # (N,)
    losses,  # (programs,), fp32
    bias_sums,  # (row blocks, targets * m), fp32, or None
    n_rows,
    k_width,
    m_width,
    row_x,
    row_w,
    row_y,
    row_g,
    stride_rw,
    SIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,  # DEPTH divides k
    ALIGN: tl.constexpr,  # divides k, m and the row strides
):
    """One program: ROWS rows and COLS columns of one target, all inputs and the whole depth.

    Column blocks run fastest, so that the programs on the machine at one time share rows of X.
    """
    k_width, m_width = multiple(k_width, ALIGN), multiple(m_width, ALIGN)
    blocks = tl.cdiv(m_width, COLS)
    row_block = tl.program_id(0) // (blocks * len(targets))
    col_block = tl.program_id(0) % (blocks * len(targets))
    target = col_block // blocks
    rows = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (col_block % blocks) * COLS + tl.arange(0, COLS)
    # Columns of the whole output, which are rows of the weight.
    units = (target * m_width + cols).to(tl.int64)
    w = weights_of(row_weight, stride_rw, rows, n_rows)
    reads = (w != 0.0)[:, None]
    inside = (cols < m_width)[None, :]
    depth = tl.arange(0, DEPTH)
    # A block of pads multiplies nothing.
    stop = tl.where(tl.max(tl.abs(w), 0) > 0.0, k_width, 0)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    # The sum over inputs stays in the accumulator: adding up launches would carry it through memory every time.
    for i in range(len(inputs)):
        from_x = select(inputs, i) + (rows * multiple(row_x, ALIGN))[:, None] + depth[None, :]
        from_w = (
            weight
            + (units * multiple(row_w, ALIGN))[None, :]
            + (i * k_width + depth).to(tl.int64)[:, None]
        )
        for k in range(0, stop, DEPTH):
            if EVEN:
                x = tl.load(from_x + k, mask=reads, other=0.0)
                v = tl.load(from_w + k, mask=inside, other=0.0)
            else:
                left = depth < k_width - k
                x = tl.load(from_x + k, mask=reads & left[None, :], other=0.0)
                v = tl.load(from_w + k, mask=left[:, None] & inside, other=0.0)
            if UPCAST:
                x, v = x.to(tl.float32), v.to(tl.float32)
            acc = tl.dot(x, v, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + units, mask=cols < m_width, other=0.0).to(tl.float32)[None, :]
    from_y = select(targets, target) + (rows * multiple(row_y, ALIGN))[:, None] + cols[None, :]
    y = tl.load(from_y, mask=reads & inside, other=0.0).to(tl.float32)
    residual = tl.where(reads & inside, acc - y, 0.0)
    weighted = (2.0 * w)[:, None] * residual
    if outputs is not None:
        to_g = select(outputs, target) + (rows * multiple(row_g, ALIGN))[:, None] + cols[None, :]
        exists = (rows < n_rows)[:, None] & inside
        tl.store(to_g, (SIGN * weighted).to(outputs[0].dtype.element_ty), mask=exists)
    # Over all at once: Triton 3.6 cannot compile one sum after the other for sm_100.
    tl.store(losses + tl.program_id(0), 0.5 * tl.sum(weighted * residual))
    if bias_sums is not None:
        to_b = bias_sums + row_block.to(tl.int64) * (m_width * len(targets)) + units
        tl.store(to_b, tl.sum(weighted, 0), mask=cols < m_width)
