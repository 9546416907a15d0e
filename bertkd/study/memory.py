"""Peak extra memory of a piece of work, on CPUs and CUDA devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that PyTorch's allocator held at once for ``work``, beyond what it held before.

    On a CPU the allocator's own events are replayed; on CUDA it is
    ``max_memory_allocated - memory_allocated``. Scratch memory that native code takes elsewhere
    (thread-local buffers of a BLAS, say) is not seen.

    Args:
        work: called once untimed to warm up, then once measured.
        device: where ``work`` allocates.
    """
    device = torch.device(device)
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        work()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ writes to stderr: the profiler announces each start and has no switch."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
