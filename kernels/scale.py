"""Multiply gradients by the factor that comes down the graph; a factor of 1 costs a launch and no memory traffic.

A loss that makes its gradient with its value has to wait for that factor, which is 1 unless the loss is weighted. Only
the device knows it, and asking would make the host wait.
"""

import triton
import triton.language as tl

from .rows import select


@triton.jit
def scale_kernel(xs, factor, count, blocks, BLOCK: tl.constexpr):
    """``x *= factor`` for every x, multiplied in fp32 and rounded once. Grid: (programs, tensors).

    Args:
        xs: tuple of tensors of ``count`` numbers without gaps.
        factor: one number.
        blocks: ``count / BLOCK`` rounded up, by the host: here the sum could pass 2^31.
    """
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        x = select(xs, tl.program_id(1))
        # Few programs, each with several blocks: where nothing is to be done, they are all that it costs.
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            scaled = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32) * by
            tl.store(x + at, scaled.to(x.dtype.element_ty), mask=at < count)
