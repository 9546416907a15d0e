"""Tensors whose sequences, or rows, lie more than 2^31 elements apart, as they are in very large ones."""

import torch

from bertkd.ops import verify
from bertkd.ops.tensors import float_tensors, unit_stride

SIZES = verify.Sizes(batch=3, heads=1, length=17, widths=(16, 8), vocabulary=40, bias=False)


def spread(x):
    """The same numbers, reaching beyond 2^31 elements along the first dimension."""
    gap = -(-(2**31) // (x.shape[0] - 1) // 16) * 16
    size = (x.shape[0] - 1) * gap + x[0].numel()
    memory = torch.empty(size, dtype=x.dtype, device=x.device)
    strides = (gap, *torch.empty(x.shape[1:]).stride())
    far = memory.as_strided(x.shape, strides)
    assert (x.shape[0] - 1) * far.stride(0) >= 2**31
    return far.copy_(x)


def far_apart(x):
    """Rows (N, d) or sequences (B, H, L, D) spread so that no kernel copies them first."""
    far = spread(x)
    assert unit_stride(far) is far
    return far


def case_of(op, device="cpu"):
    """Without pads: the last rows, whose addresses are the large ones, must be read."""
    weight, *rest = verify.random_case(op, [torch.float16] * verify.TENSORS[op], SIZES, device)
    is_mask = [isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in rest]
    rest = [torch.ones_like(x) if mask else x for x, mask in zip(rest, is_mask, strict=True)]
    return [torch.linspace(0.5, 1.0, weight.numel(), device=device).view(weight.shape), *rest]


def moved(case, place):
    """The case with one of its tensors far apart."""
    near = float_tensors(case[1:])[place]
    far = far_apart(near)

    def swap(arg):
        if isinstance(arg, list):
            return [swap(x) for x in arg]
        return far if arg is near else arg

    return [case[0], *map(swap, case[1:])]


def check(function, case, places, *, weighted):
    """What a form of an op gives does not depend on where its tensors lie; ``rows`` take no weight."""
    near = verify._results(function(*case[not weighted :]))
    for place in range(places):
        got = verify._results(function(*moved(case, place)[not weighted :]))
        for a, b in zip(got, near, strict=True):
            torch.testing.assert_close(a, b)
    if weighted:
        for a, b in zip(verify._results(function(spread(case[0]), *case[1:])), near, strict=True):
            torch.testing.assert_close(a, b)
