"""What the attention kernels share: tiles, dot products, and the extents of padded sequences.

Scores are handled in base 2: a factor c on scores arrives as c log2(e) and is applied after the dot product, inside
the multiply-add that subtracts the row's maximum. Products run over head widths padded to a power of two with zeros.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# Stands for minus infinity in running maxima: the difference of two of them is 0 and not NaN.
LOW = tl.constexpr(-1e30)
# Where a token stands that no window reaches: windows are shorter than sequences.
FAR = tl.constexpr(1 << 30)
# Differences of probabilities are at most 1; moved up by this they keep all their bits in float16.
HALF_RANGE = tl.constexpr(16384.0)

# Columns of the extents table.
KEY_FIRST = tl.constexpr(0)
KEY_DENSE = tl.constexpr(1)
KEY_END = tl.constexpr(2)
ROW_FIRST = tl.constexpr(3)
ROW_END = tl.constexpr(4)
EXTENTS = tl.constexpr(8)


@triton.jit
def load_rows(
    base, start, stride, stop, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    EDGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows ``start ... start + ROWS`` of a head as (ROWS, PADDED); with EDGE those from ``stop`` on are 0.

    Address arithmetic over tiles is in 64 bits. UPCAST is for the interpreter, which multiplies bfloat16 wrongly.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    at = base + tl.cast(start, tl.int64) * stride
    at = at + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if EDGE:
        inside = rows[:, None] < stop - start
        if WIDTH != PADDED:
            inside = inside & (columns[None, :] < WIDTH)
        tile = tl.load(at, mask=inside, other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        tile = tl.load(at)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(
    base, start, stride, stop, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Write the rows below ``stop`` of a tile (ROWS, PADDED), in the dtype of the memory."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    at = base + tl.cast(start, tl.int64) * stride
    at = at + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows[:, None] < stop - start) & (columns[None, :] < WIDTH)
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, FP32: tl.constexpr):
    """``a @ b`` summed in fp32; fp32 operands as three products of tf32 halves (error near fp32's)."""
    if FP32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def dot_add(a, b, sums, FP32: tl.constexpr):
    """``sums + a @ b``: see ``dot``."""
    if FP32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32x3")
    else:
        return tl.dot(a, b, sums)


@triton.jit
def quotient(a, b):
    """``a / b``, exactly 1 where they are equal: the fast division of GPUs does not promise that."""
    return tl.where(a == b, 1.0, a / b)


@triton.jit
def half_scale(peak):
    """Factor that takes weighted differences of probabilities into float16's range, from the largest weight."""
    return HALF_RANGE / tl.maximum(tl.load(peak), 1e-30)


@triton.jit
def operand(x, tile, FP32: tl.constexpr):
    """An fp32 result as a factor of a product with ``tile``: rounded once, to its dtype, unless the product is fp32."""
    if FP32:
        return x
    else:
        return x.to(tile.dtype)


@triton.jit
def real_keys(mask, start, stride, stop, SIZE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether the positions ``start ... start + SIZE`` hold real tokens before ``stop``."""
    at = start + tl.arange(0, SIZE)
    inside = at < stop
    if HAS_MASK:
        found = tl.load(mask + at.to(tl.int64) * stride, mask=inside, other=0)
        return inside & (found != 0)
    else:
        return inside


@triton.jit
def reach(first, end, start, stop, window):
    """The part of ``first ... end`` that is at most ``window`` away from a position of ``start ... stop``."""
    return tl.maximum(first, start - window), tl.minimum(end, stop + window)


@triton.jit
def places(counts, start, SIZE: tl.constexpr):
    """The positions ``start ... start + SIZE``, but FAR for those that do not count: ``within`` leaves them out."""
    return tl.where(counts, start + tl.arange(0, SIZE), FAR)


@triton.jit
def within(rows, columns, window):
    """Which pairs of positions (rows, columns) are at most ``window`` apart."""
    past_first = columns[None, :] - (rows - window)[:, None]
    # What is negative is large as an unsigned number: one comparison does for both ends.
    return past_first.to(tl.uint32) <= (2 * window).to(tl.uint32)


@triton.jit
def sequence_extents(
    mask, weight, extents, peak, mask_b, mask_l, weight_b, weight_h, weight_l, weight_heads, L,
    HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence: where its real keys and weighted rows begin and end, and its largest |weight|.

    Writes five numbers a row of ``extents`` (B, EXTENTS): first real key, end of the run of real keys that starts
    there, end of the real keys, first and end of the rows of weight != 0. What lies outside is never computed.
    """
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    extents += b * EXTENTS
    key_first, key_end, key_dense = L * 0, L, L
    if HAS_MASK:
        first = tl.full((BLOCK,), 2147483647, tl.int32)
        end = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, L, BLOCK):
            real = real_keys(mask + b * mask_b, start, mask_l, L, BLOCK, True)
            first = tl.minimum(first, tl.where(real, start + at, 2147483647))
            end = tl.maximum(end, tl.where(real, start + at + 1, 0))
        key_first, key_end = tl.min(first, 0), tl.max(end, 0)
        hole = tl.full((BLOCK,), 2147483647, tl.int32)
        for start in range(0, L, BLOCK):
            real = real_keys(mask + b * mask_b, start, mask_l, L, BLOCK, True)
            is_hole = (start + at > key_first) & (real == 0)
            hole = tl.minimum(hole, tl.where(is_hole, start + at, 2147483647))
        key_dense = tl.minimum(tl.min(hole, 0), key_end)
    row_first, row_end = L * 0, L
    if HAS_WEIGHT:
        first = tl.full((BLOCK,), 2147483647, tl.int32)
        end = tl.zeros((BLOCK,), tl.int32)
        largest = tl.zeros((BLOCK,), tl.float32)
        for h in range(0, weight_heads):
            for start in range(0, L, BLOCK):
                row = start + at
                w = weight + b * weight_b + tl.cast(h, tl.int64) * weight_h
                w = tl.load(w + row.to(tl.int64) * weight_l, mask=row < L, other=0.0)
                largest = tl.maximum(largest, tl.abs(w))
                first = tl.minimum(first, tl.where(w != 0, row, 2147483647))
                end = tl.maximum(end, tl.where(w != 0, row + 1, 0))
        row_first, row_end = tl.min(first, 0), tl.max(end, 0)
        tl.store(peak + b, tl.max(largest, 0))
    tl.store(extents + KEY_FIRST, key_first)
    tl.store(extents + KEY_DENSE, key_dense)
    tl.store(extents + KEY_END, key_end)
    tl.store(extents + ROW_FIRST, row_first)
    tl.store(extents + ROW_END, row_end)
