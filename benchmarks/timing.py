"""Interleaved timing: the contestants take turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every round of every contestant.

    Args:
        contestants: name -> function without arguments.
        rounds: timed rounds; in each, every contestant runs once, in turn.
        warmup: rounds that are not kept.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(warmup + rounds):
        for name, run in contestants.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    """Wait for the device, where there is one to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile in milliseconds."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return deciles[1] * 1e3, deciles[4] * 1e3, deciles[7] * 1e3


def ratio(seconds: Mapping[str, list[float]], base: str, other: str) -> float:
    """Median over the rounds of base / other: how many times faster ``other`` is."""
    return statistics.median(b / o for b, o in zip(seconds[base], seconds[other], strict=True))
