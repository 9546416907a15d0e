"""What the kernels on rows of states and logits share."""

import triton
import triton.language as tl


@triton.jit
def select(choices, index):
    """The element of a tuple of pointers at an index that is known at run time only.

    A chain of selects on scalars: a table of addresses in device memory would need a copy from the host
    per call, which a CUDA graph would replay with stale addresses.
    """
    chosen = choices[0]
    for i in tl.static_range(1, len(choices)):
        chosen = tl.where(index == i, choices[i], chosen)
    return chosen


@triton.jit
def weights_of(row_weight, stride, rows, n_rows):
    """Weights of ``rows`` in fp32, 0 past the end; a row of weight 0 needs no reading. None weighs each 1."""
    if row_weight is None:
        w = tl.where(rows < n_rows, 1.0, 0.0)
    else:
        w = tl.load(row_weight + rows * stride, mask=rows < n_rows, other=0.0).to(tl.float32)
    return w


@triton.jit
def multiple(value, ALIGN: tl.constexpr):
    """``value``, which is a multiple of ALIGN, in a way that tells the compiler so: it asks only for 16 by itself.

    Rows of 312 half-precision numbers are 16-byte aligned, and without this would be read one by one.
    """
    return value // ALIGN * ALIGN
