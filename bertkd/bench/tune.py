"""Measure tile shapes of the Triton attention kernels on this GPU, and keep those faster than the shipped ones."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bertkd.bench.timing import GraphReplay, check_device
from bertkd.ops.triton.config import (
    FORMS,
    Config,
    candidates,
    read_tuned,
    trial,
    tuned_key,
    write_tuned,
)
from bertkd.ops.verify import TENSORS, Sizes, compare, random_case

# A candidate must beat the shipped configuration by more than timing noise does.
GAIN = 0.97

# Form -> the op that runs it, whether forward alone, and a length that takes this form.
WORKLOADS = {
    "rows": ("relation_kl", "rows", 512),
    "grad_rows": ("relation_kl", "fwd_bwd", 512),
    "grad_keys": ("relation_kl", "fwd_bwd", 512),
    **{
        f"{prefix}short{suffix}": (f"{prefix}relation_kl", "fwd_bwd", length)
        for prefix in ("", "self_")
        for suffix, length in (("_16", 16), ("_32", 32), ("_64", 64), ("", 128))
    },
    "pairs": ("attention_mse", "fwd_bwd", 64),
    "gram": ("attention_mse", "fwd_bwd", 1024),
    "gram_grad": ("attention_mse", "fwd_bwd", 1024),
    "gram_rows": ("attention_mse", "rows", 1024),
}
# Enough that the inputs of a call do not stay in L2 for the next one.
TOKENS, HEADS = 32768, 12
CALLS, REPLAYS = 4, 15

Timer = Callable[[Callable[[], object]], float]


class Found(NamedTuple):
    """The best configuration of a form, and what it and the shipped one took: ``inf`` where that one failed."""

    key: str
    config: Config
    milliseconds: float
    shipped: Config
    shipped_milliseconds: float

    @property
    def is_faster(self) -> bool:
        """Whether it is worth storing."""
        return self.milliseconds < GAIN * self.shipped_milliseconds


def tune(
    dtypes: Sequence[torch.dtype],
    widths: Sequence[int],
    forms: Sequence[str] = FORMS,
    *,
    device: torch.device | str = "cuda",
    budget_minutes: float | None = None,
    tokens: int = TOKENS,
    timer: Timer | None = None,
    say: Callable[[str], object] = print,
) -> Iterator[Found]:
    """Try every candidate of every form, one configuration at a time, and store what is faster.

    Wrong results disqualify: a candidate must agree with float64 first. Where the shipped one is wrong or
    does not run, the best of the others takes its place.

    Args:
        dtypes, widths: of the heads of both sides.
        forms: of ``WORKLOADS``.
        device: a CUDA device.
        budget_minutes: start no further form after this time.
        tokens: B * L of the timed cases.
        say: told what was left out, and which forms no configuration suits.
        timer: milliseconds of a call; by default the median of replays of a CUDA graph.

    Yields:
        What was found for each form, after it has been stored.

    Raises:
        ValueError: the file that it would be stored in is damaged.
        DeviceLost: a candidate has cost the device, on which all after it would fail too.
    """
    started = time.monotonic()
    name = torch.cuda.get_device_name(device)
    read_tuned(name)  # now: a kernel that finds it damaged would pass for one that does not run
    major, minor = torch.cuda.get_device_capability(device)
    left_out = []
    for dtype in dtypes:
        for width in widths:
            for form in (form for form in WORKLOADS if form in forms):
                key = tuned_key(form, 8 * dtype.itemsize, width)
                if budget_minutes and time.monotonic() - started > 60 * budget_minutes:
                    left_out.append(key)
                    continue
                tried = list(candidates(form, 8 * dtype.itemsize, width, 10 * major + minor))
                if not tried:
                    continue  # this form is not made for such heads
                found = _best(form, key, tried, dtype, width, device, tokens, timer or _median)
                if found is None:
                    say(f"{key}: no configuration runs on this GPU and agrees with float64")
                    continue
                if found.is_faster:
                    write_tuned(name, {key: found.config})
                yield found
    if left_out:
        say(f"left out for want of time ({len(left_out)}): " + ", ".join(left_out))


def _best(form, key, tried, dtype, width, device, tokens, timer) -> Found | None:
    """The fastest right candidate, or None; the first one is the shipped one."""
    op, mode, length = WORKLOADS[form]
    dtypes = [dtype] * TENSORS[op]
    small = random_case(op, dtypes, Sizes(length=length - 3, widths=(width, width)), device)
    sizes = Sizes(max(1, tokens // length), HEADS, length, (width, width))
    weight, *args = random_case(op, dtypes, sizes, device)
    measured: dict[Config, float] = {}
    for config in tried:
        with trial(key, config):
            milliseconds = _measure(op, mode, weight, args, small, timer)
        if milliseconds is not None:
            measured[config] = milliseconds
    if not measured:
        return None
    best = min(measured, key=lambda config: measured[config])
    return Found(key, best, measured[best], tried[0], measured.get(tried[0], math.inf))


def _measure(op, mode, weight, args, small, timer) -> float | None:
    from bertkd.ops import triton as kernels

    function = getattr(kernels, f"{op}_{mode}")
    inputs = args if mode == "rows" else [weight, *args]
    try:
        if not compare(op, "triton", small, mode).agrees:
            return None
        return timer(lambda: function(*inputs))
    except Exception:
        check_device(weight.device)
        # What needs more registers or shared memory than there are fails to compile or launch: no candidate.
        return None


def _median(run: Callable[[], object]) -> float:
    """Milliseconds by replays of a CUDA graph: launches one by one would time the host where a kernel is short."""
    replay = GraphReplay([run] * CALLS)
    return 1e3 * statistics.median(replay() for _ in range(REPLAYS))
