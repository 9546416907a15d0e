"""What the tests of the native kernels share: the skip, the instruction sets to run, the bound on errors."""

import contextlib

import pytest
import torch

from bertkd.ops import native
from bertkd.ops.native.library import kernels

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)
ISAS = [] if native.unavailable() else kernels().cpu_isas().split(",")
LOW = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def machine(isa, threads=1):
    """Run with one of the instruction sets and a number of threads; both are set back."""
    before, threads_before = native.isa(), torch.get_num_threads()
    kernels().select_cpu_isa(isa)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        kernels().select_cpu_isa(before)
        torch.set_num_threads(threads_before)


def assert_close(actual, expected, rows):
    """Within 1e-5 relative, over a floor of fp32 rounding per row where the exact value is (nearly) 0."""
    for got, want in zip(actual, expected, strict=True):
        error, size = (got.double() - want).norm(), want.norm()
        assert torch.isfinite(got).all()
        assert error <= 1e-5 * size + 2e-6 * rows, f"{error:.1e} off {size:.1e}"
