"""Times to trust: contestants take turns on a CPU; CUDA graphs are replayed over rotating inputs on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Run = Callable[[], object]
OnFailure = Callable[[str, Exception], object]


class Spread(NamedTuple):
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Percentiles of measured values; of a single one it is thrice the same.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError("values is empty: nothing was measured.")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(deciles[1], deciles[4], deciles[7])


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """base / other, round by round: how many times faster ``other`` is.

    Rounds of a pair lie next to each other in time, so what slows the machine for a while cancels.
    """
    return [b / o for b, o in zip(base, other, strict=False)]


def interleaved(
    runs: Mapping[str, Run],
    *,
    rounds: int = 15,
    seconds: float = 20.0,
    warmup: int = 1,
    synchronise: Callable[[], object] = lambda: None,
    on_failure: OnFailure | None = None,
) -> dict[str, list[float]]:
    """Seconds of every round of every contestant; in a round each runs once, in turn.

    Args:
        runs: name -> what to time.
        rounds: timed rounds.
        seconds: no further round is started after this time, but three are made in any case.
        warmup: rounds that are not kept.
        synchronise: waits for the device.
        on_failure: is told who raised what, and takes them out of the further rounds and of the result; without it
            the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    started = time.perf_counter()
    for number in range(warmup + rounds):
        kept = number - warmup
        if kept >= 3 and time.perf_counter() - started > seconds:
            break
        # Each round starts with another contestant: nobody always runs after the same neighbour.
        shift = number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            try:
                synchronise()
                start = time.perf_counter()
                runs[name]()
                synchronise()
            except Exception as failure:
                if on_failure is None:
                    raise
                names.remove(name)
                del times[name]
                on_failure(name, failure)
                continue
            if kept >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def told(failure: BaseException) -> dict[str, Any]:
    """An error as status and note of a row."""
    # Here: `bench compare` runs this package with an older commit's library, which may lack it.
    from bertkd.errors import ran_out_of_memory

    if ran_out_of_memory(failure):
        return {"status": "oom", "note": "out of memory"}
    return {"status": "error", "note": f"{type(failure).__name__}: {first_line(failure)}"}


def first_line(failure: BaseException) -> str:
    """First line of an error, cut to fit a table; empty where it says nothing."""
    lines = str(failure).strip().splitlines()
    return lines[0][:160] if lines else ""


class DeviceLost(RuntimeError):
    """The GPU fails whatever this process asks of it, as after an illegal memory access."""


def check_device(device: torch.device) -> None:
    """Find out after an error whether it was that of one call, or leaves the device unusable.

    Raises:
        DeviceLost: the GPU is of no more use to this process.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        why = first_line(error) or type(error).__name__
        raise DeviceLost(f"the GPU is lost to this process: {why}") from error


class Failures:
    """Who failed while contestants were timed, by name, as status and note of a row.

    Raises (where it is told of a failure):
        DeviceLost: it has cost the device; the contestants after it would be blamed for that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, failure: Exception) -> None:
        self.found[name] = told(failure)
        if self.found[name]["status"] == "error":
            check_device(self.device)


class GraphReplay:
    """A CUDA graph of one call per set of inputs; a replay visits them all, so that L2 is cold for each.

    Falls back to timing the calls by events where a contestant cannot be captured.

    Args:
        calls: one per set of inputs.
        capturable: known not to wait for the device during a capture, even if it does so otherwise.
    """

    def __init__(self, calls: Sequence[Run], *, capturable: bool = False) -> None:
        self.calls = calls
        self.graph: torch.cuda.CUDAGraph | None = None
        self.note = "cuda graph"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        try:
            # A capture that fails leaves PyTorch 2.11 with a capturing stream and a pool that is never emptied:
            # a contestant that waits for the device is found out before it.
            if not capturable:
                torch.cuda.set_sync_debug_mode("error")
                try:
                    calls[0]()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            self.graph = graph
        except Exception as error:  # whatever a contestant does that a capture forbids
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.note = f"events, not capturable: {type(error).__name__}"
        torch.cuda.synchronize()

    def __call__(self) -> float:
        """Seconds per call of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.calls)


def replayed(
    makers: Mapping[str, Callable[[], GraphReplay]],
    *,
    rounds: int = 15,
    seconds: float = 20.0,
    on_failure: OnFailure | None = None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call of every round, and a note, of every contestant.

    One contestant's graph is alive at a time, since each keeps its own memory. All are visited twice, the second
    time backwards, so that a clock that drifts meets early and late contestants alike.

    Args:
        makers: name -> what makes the replay to time.
        rounds, seconds: as for `interleaved`.
        on_failure: as for `interleaved`.
    """
    times: dict[str, list[float]] = {name: [] for name in makers}
    notes: dict[str, str] = {}
    for names in (list(makers), list(makers)[::-1]):
        for name in names:
            if name not in times:
                continue
            release_memory()
            try:
                replay: GraphReplay | None = makers[name]()
                assert replay is not None
                notes[name] = replay.note
                times[name] += _rounds(replay, -(-rounds // 2), seconds / len(names) / 2)
            except Exception as failure:
                if on_failure is None:
                    raise
                del times[name]
                # Its frames hold what there was in memory.
                on_failure(name, failure.with_traceback(None))
            finally:
                replay = None
    return times, notes


def _rounds(replay: GraphReplay, rounds: int, seconds: float) -> list[float]:
    replay()
    replay()
    kept: list[float] = []
    started = time.perf_counter()
    while len(kept) < rounds and (len(kept) < 3 or time.perf_counter() - started < seconds):
        kept.append(replay())
    return kept


def release_memory() -> None:
    """Give back to the GPU what nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def input_sets(nbytes: int, l2_bytes: int) -> int:
    """How many sets of inputs fill the L2 cache twice, so that none is still in it when its turn comes; 64 at most."""
    return max(2, min(64, -(-2 * l2_bytes // max(nbytes, 1)) + 1))
