"""What the tests of the native kernels share: the skip, the instruction sets to run, the bound on errors."""

import contextlib
import subprocess
import sys

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


_MEMORY = """
import torch

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

make = lambda n: [torch.randn(1, n, 12, 64).transpose(1, 2).requires_grad_() for _ in range(4)]
step(*make(64))
tensors = make(4096)
before = peak()
step(*tensors)
print(peak() - before)
"""


def extra_memory(definition):
    """Bytes that ``step`` of four tensors (1, 12, 4096, 64), as ``definition`` has it, adds in a process of its own."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    result = subprocess.run(
        [sys.executable, "-c", definition + _MEMORY], capture_output=True, text=True, check=True
    )
    return int(result.stdout)
