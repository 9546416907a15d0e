"""Tensors whose sequences, or rows, lie more than 2^31 elements apart: every address has 64 bits.

Only the pages that are touched exist, so this needs no more memory than any other test.
"""

import pytest
import torch

from bertkd.ops import native, verify
from bertkd.ops.dispatch import implementation, unavailable
from bertkd.ops.schema import float_tensors, value_form
from bertkd.ops.tensors import unit_stride

SIZES = verify.Sizes(batch=3, heads=1, length=17, widths=(16, 8), vocabulary=40)


def far_apart(x):
    """The same numbers, in rows (N, d) or sequences (B, H, L, D) that reach beyond 2^31 elements."""
    gap = -(-(2**31) // (x.shape[0] - 1) // 16) * 16
    memory = torch.empty((x.shape[0] - 1) * gap + x[0].numel(), dtype=x.dtype)
    strides = (gap, *torch.empty(x.shape[1:]).stride())
    far = memory.as_strided(x.shape, strides)
    assert (x.shape[0] - 1) * far.stride(0) >= 2**31
    assert unit_stride(far) is far
    return far.copy_(x)


def case_of(op):
    """Without pads: the last rows, whose addresses are the large ones, must be read."""
    weight, *rest = verify.random_case(op, [torch.float16] * verify.TENSORS[op], SIZES, "cpu")
    is_mask = [isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in rest]
    rest = [torch.ones_like(x) if mask else x for x, mask in zip(rest, is_mask, strict=True)]
    return [torch.linspace(0.5, 1.0, weight.numel()).view(weight.shape), *rest]


def moved(case, place):
    """The case with one of its tensors far apart."""
    near = float_tensors(case[1:])[place]
    far = far_apart(near)

    def swap(arg):
        if isinstance(arg, list):
            return [swap(x) for x in arg]
        return far if arg is near else arg

    return [case[0], *map(swap, case[1:])]


@pytest.mark.parametrize("form", ["fwd_bwd", "value"])
@pytest.mark.parametrize(
    ("op", "impl"),
    [
        (op, impl)
        for op in sorted(verify.TENSORS)
        for impl in ("triton", "native", "chunked")
        if impl != "native" or hasattr(native, f"{op}_fwd_bwd")
    ],
)
def test_offsets_beyond_32_bits(op, impl, form):
    if (reason := unavailable(impl)) is not None:
        pytest.skip(reason)
    case = case_of(op)
    form = value_form(op) if form == "value" else form
    function = getattr(implementation(impl), f"{op}_{form}")
    first = form == "rows"  # the weights of the rows are not among its arguments
    near = verify._results(function(*case[first:]))
    for place in range(verify.TENSORS[op]):
        got = verify._results(function(*moved(case, place)[first:]))
        for a, b in zip(got, near, strict=True):
            torch.testing.assert_close(a, b)
