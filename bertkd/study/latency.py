"""Latency of several callables, fairly: interleaved runs, medians, thread count noted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latency:
    """Median seconds per call by name, and the conditions they were measured under."""

    seconds: dict[str, float]
    device: str
    threads: int
    rounds: int


def measure_latency(
    runs: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 15,
    warmup: int = 2,
) -> Latency:
    """Time each callable once per round, in turn, and take the median over rounds.

    Taking turns lets a slow spell of the machine hit all of them alike; the median drops it.

    Args:
        runs: name -> callable without arguments.
        device: where the work happens; CUDA work is waited for before the clock stops.
        rounds: timed calls of each.
        warmup: untimed calls of each before that.

    Raises:
        ValueError: ``runs`` is empty or ``rounds`` is below 1.
    """
    if not runs or rounds < 1:
        raise ValueError(f"need something to run and rounds >= 1, got {len(runs)} and {rounds}.")
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            seconds = _timed(run, device)
            if turn >= warmup:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Latency(medians, _device_name(device), torch.get_num_threads(), rounds)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
