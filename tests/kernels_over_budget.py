"""Cases for the kernels report of which all but one break a budget, each in its own way."""

from dataclasses import replace

import triton
import triton.language as tl
from harness import Case


@triton.jit
def scores(a, b, out, n, WIDTH: tl.constexpr, TILE: tl.constexpr):
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, WIDTH)[None, :]
    x = tl.load(a + rows * WIDTH + columns)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, n, TILE):
        y = tl.load(b + (start + rows) * WIDTH + columns)
        total += tl.sum(tl.exp2(tl.dot(x, y.T)), 1)
    tl.store(out + tl.arange(0, TILE), total)


def cases():
    good = Case(
        op="good",
        form="",
        dtype="bf16",
        width=64,
        arch=80,
        kernel=scores,
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32"},
        constants={"WIDTH": 64, "TILE": 64},
        max_registers=128,
        tensor_cores=True,
        pairs=64 * 64,
        max_per_pair=8,
    )
    return [
        good,
        replace(good, op="spills", constants={"WIDTH": 64, "TILE": 256}, max_per_pair=None),
        replace(good, op="registers", max_registers=32),
        replace(good, op="shared", max_shared=1024),
        replace(good, op="tensor_cores", tensor_cores=False),
        replace(good, op="instructions", max_per_pair=1),
        replace(good, op="compiles_not", constants={"WIDTH": 63, "TILE": 64}),
    ]
