"""Peak memory of the losses, measured as the peak resident size of a child process."""

import functools
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from bertkd import functional

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

impl, length = sys.argv[1], int(sys.argv[2])
make = lambda n: [torch.randn(1, n, 4, 64).transpose(1, 2).requires_grad_() for _ in range(4)]
def step(tensors):
    functional.attention_kl(*tensors, impl=impl).backward()
step(make(64))
tensors = make(length)
before = peak()
step(tensors)
print(peak() - before)
"""


@functools.cache
def extra_bytes(impl, length):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, impl, str(length)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_attention_kl_at_length_4096_needs_under_5_percent_of_eager():
    eager, chunked = extra_bytes("eager", 4096), extra_bytes("chunked", 4096)
    one_map = 4 * 4096 * 4096 * 4
    assert eager > 4 * one_map, (
        "eager is expected to hold several maps; is this measuring anything?"
    )
    assert chunked < 0.05 * eager, f"{chunked / 2**20:.0f} MiB against {eager / 2**20:.0f} MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_grows_linearly_with_length():
    short, long = extra_bytes("chunked", 1024), extra_bytes("chunked", 4096)
    assert long < 6 * max(short, 2**24), (
        f"{short / 2**20:.0f} MiB, then {long / 2**20:.0f} MiB at four times the length"
    )
