"""Tensors that reach beyond 2^31 elements: every address has 64 bits.

Only the pages that are touched exist, so this needs no more memory than any other test.
"""

import pytest
from far_apart import case_of, check

from bertkd.ops import native, verify
from bertkd.ops.implementations import implementation, unavailable
from bertkd.ops.schema import value_form


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
    form = value_form(op) if form == "value" else form
    function = getattr(implementation(impl), f"{op}_{form}")
    check(function, case_of(op), verify.TENSORS[op], weighted=form != "rows")
