"""How near a measurement is to what the device could do: ceilings measured in the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bertkd.bench.spec import Work
from bertkd.ops.native import library as native

SECONDS = 0.3  # spent on each ceiling
CALLS = 10  # of a program in a row, on a GPU


class Ceilings(NamedTuple):
    """What the device reaches on the simplest programs: bytes, flops and exponentials per second."""

    bytes: float
    flops: float
    exps: float


def bound(work: Work, ceilings: Ceilings) -> tuple[float, str]:
    """Least seconds that the work takes on the device, and the resource that binds it.

    The three overlap at best perfectly, so the largest is the bound.
    """
    times = {
        "bytes": work.bytes / ceilings.bytes,
        "flops": work.flops / ceilings.flops,
        "exps": work.exps / ceilings.exps,
    }
    binding = max(times, key=lambda name: times[name])
    return times[binding], binding


class MeasuredCeilings:
    """The ceilings by dtype, each measured when it is first asked for; ``found`` holds them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, Ceilings] = {}

    def __call__(self, dtype: str) -> Ceilings:
        if dtype not in self.found:
            self.found[dtype] = measure_ceilings(self.device, getattr(torch, dtype))
        return self.found[dtype]


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Stream copy, matrix product in ``dtype``, which is that of the cases, and float32 exponentials."""
    return Ceilings(_copied(device), _multiplied(device, dtype), _exps(device))


def _copied(device: torch.device) -> float:
    source = torch.rand(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * source.nbytes, device)


def _multiplied(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _rate(lambda: a @ b, 2 * size**3, device)


def _exps(device: torch.device) -> float:
    if device.type == "cuda":
        # Chained in registers: one exponential per element would only measure memory.
        chain, links = torch.compile(_chained), 64
        x = torch.rand(2**24, device=device)
        try:
            return _rate(lambda: chain(x, links), x.numel() * links, device)
        except Exception:  # without a compiler there is no such program, and no such bound
            return math.inf
    # Small enough for the caches of two cores, large enough to be split among threads.
    x = torch.rand(2**17)
    out = torch.empty_like(x)
    rate = _rate(lambda: torch.exp(x, out=out), x.numel(), device)
    if native.unavailable() is not None:
        return rate
    # PyTorch's is the more exact and slower one: a ceiling is that of the fastest program there is.
    each = 2**15
    ours = partial(native.kernels().exp2, x.data_ptr(), out.data_ptr(), each)
    return max(rate, torch.get_num_threads() * _rate(ours, each, device))


def _chained(x: torch.Tensor, links: int) -> torch.Tensor:
    # Base 2, as the kernels have it: one instruction. torch.exp takes nine, and would measure those.
    for _ in range(links):
        x = torch.exp2(-x)
    return x


def _rate(run: Callable[[], object], amount: float, device: torch.device) -> float:
    """Best amount per second: a ceiling is what can be reached, not what is usual."""

    def once() -> float:
        if device.type == "cuda":
            return _seconds_on_cuda(run)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    once()
    once()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        best = min(best, once())
    return amount / best


def _seconds_on_cuda(run: Callable[[], object]) -> float:
    """Of one call among several in a row: what the host takes to launch the first is no share of the GPU's rate."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS
