"""Run one case: verify, time, weigh and relate to the roofline; every finding is a row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bertkd.bench.cases import Case
from bertkd.bench.contestants import MODES, OURS, applies, loss_of, small, step, why_not
from bertkd.bench.memory import peak_in_child
from bertkd.bench.ops import SPECS
from bertkd.bench.record import Row
from bertkd.bench.roofline import Ceilings, bound
from bertkd.bench.selection import Selection
from bertkd.bench.spec import Inputs, Loss
from bertkd.bench.timing import (
    Failures,
    GraphReplay,
    OnFailure,
    check_device,
    input_sets,
    interleaved,
    ratios,
    release_memory,
    replayed,
    spread,
    told,
)
from bertkd.bench.verify import Oracle
from bertkd.study.memory import peak_extra_bytes

BASELINE = "eager"


@dataclass
class Settings:
    """How a run measures.

    Attributes:
        device: to measure on.
        selection: impls and modes to run.
        impls: all contestants in order.
        rounds, seconds: of timing, per case and mode.
        weigh: whether to measure memory.
        fill: whether to search for the largest batch of a training step.
        stamp: columns that every row gets.
        ceilings: by dtype.
    """

    device: torch.device
    selection: Selection
    impls: tuple[str, ...]
    rounds: int = 15
    seconds: float = 15.0
    weigh: bool = True
    fill: bool = True
    stamp: dict[str, Any] = field(default_factory=dict)
    ceilings: Callable[[str], Ceilings] | None = None


def run_case(case: Case, settings: Settings) -> Iterator[Row]:
    """All rows of a case."""
    if "torch._dynamo" in sys.modules:
        # PyTorch keeps 8 graphs of a function: those of the cases before must not count.
        torch.compiler.reset()
    inputs = make_inputs(case, settings.device)
    oracle = Oracle(case.op, inputs)
    losses: dict[str, Loss | None] = {}
    for mode in MODES:
        if not settings.selection.allows("mode", mode):
            continue
        admitted: dict[str, float] = {}
        for impl in settings.impls:
            # The baseline always runs: a speed-up needs it in the same rounds.
            wanted = settings.selection.allows("impl", impl)
            if not (wanted or impl == BASELINE) or not applies(impl, case.op, mode):
                continue
            row = partial(Row, **case.columns, impl=impl, mode=mode, **settings.stamp)
            status, note, error = _admit(impl, case, mode, oracle, losses, settings)
            if status == "ok":
                admitted[impl] = error
            elif wanted:
                yield row(metric="time", unit="ms", status=status, note=note)
            if status == "error":
                # Or every contestant after it would be blamed, and lose what was measured of it before.
                check_device(settings.device)
        if any(settings.selection.allows("impl", impl) for impl in admitted):
            yield from _measure(case, mode, inputs, admitted, losses, settings)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """The case's random inputs; the same for everybody with the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return SPECS[case.op].make(case, device, generator)


def _admit(
    impl: str,
    case: Case,
    mode: str,
    oracle: Oracle,
    losses: dict[str, Loss | None],
    settings: Settings,
) -> tuple[str, str, float]:
    """Status, reason and error: only what is "ok" is timed."""
    reason = why_not(impl, case, settings.device, mode)
    if reason is not None:
        return "unavailable", reason, 0.0
    if impl == "products":
        losses[impl] = None
        return "ok", "", 0.0
    release_memory()
    try:
        loss = losses.setdefault(impl, None) or loss_of(impl, case.op)
        losses[impl] = loss
        verdict = oracle.judge(impl, loss, mode)
    except Exception as failure:  # a contestant's failure is its own, the others go on
        found = told(failure)
        return found["status"], found["note"], 0.0
    if verdict.wrong is not None:
        return "red", verdict.wrong, verdict.error
    return "ok", "", verdict.error


def _measure(
    case: Case,
    mode: str,
    inputs: Inputs,
    admitted: dict[str, float],
    losses: dict[str, Loss | None],
    settings: Settings,
) -> Iterator[Row]:
    runs = {impl: step(impl, case.op, losses[impl], mode) for impl in admitted}
    failures = Failures(settings.device)
    try:
        seconds, notes = times_of(case, inputs, runs, settings, failures)
    finally:
        row = partial(Row, **case.columns, mode=mode, metric="time", unit="ms", **settings.stamp)
        yield from (row(impl=impl, **found) for impl, found in failures.found.items())
    for impl, times in seconds.items():
        if not settings.selection.allows("impl", impl):
            continue
        common: dict[str, Any] = {
            **case.columns,
            "impl": impl,
            "mode": mode,
            "rounds": len(times),
            "error": admitted[impl],
            "note": notes.get(impl, ""),
            **settings.stamp,
        }
        milliseconds = spread([value * 1e3 for value in times])
        yield Row(**common, metric="time", unit="ms", **milliseconds._asdict())
        if impl != BASELINE and seconds.get(BASELINE):
            gain = spread(ratios(seconds[BASELINE], times))
            yield Row(**common, metric="speedup", unit="x", against=BASELINE, **gain._asdict())
        if impl == "products":
            continue
        if settings.ceilings is not None:
            work = SPECS[case.op].work(case, mode == "fwd_bwd")
            least, binding = bound(work, settings.ceilings(case.dtype))
            share = spread([least / value for value in times])
            yield Row(**common, metric="roofline", unit="share", against=binding, **share._asdict())
        if settings.weigh and mode == "fwd_bwd":
            yield _weigh(case, impl, inputs, runs[impl], common, settings.device)


def times_of(
    case: Case,
    inputs: Inputs,
    runs: dict[str, Callable[[Inputs], list]],
    settings: Settings,
    on_failure: OnFailure | None = None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every round by contestant, and how they were taken; ``on_failure`` is as for `interleaved`."""
    options: dict[str, Any] = {
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "on_failure": on_failure,
    }
    if settings.device.type != "cuda":
        return interleaved(
            {impl: partial(run, _laid_out(impl, inputs)) for impl, run in runs.items()}, **options
        ), {}
    card = torch.cuda.get_device_properties(settings.device)
    count = input_sets(inputs.nbytes, card.L2_cache_size)
    sets = [inputs, *(make_inputs(case, settings.device, seed) for seed in range(1, count))]
    makers = {impl: partial(_replay, impl, run, sets) for impl, run in runs.items()}
    return replayed(makers, **options)


def _replay(impl: str, run: Callable[[Inputs], list], sets: list[Inputs]) -> GraphReplay:
    calls = [partial(run, _laid_out(impl, each)) for each in sets]
    return GraphReplay(calls, capturable=impl in OURS)


def _laid_out(impl: str, inputs: Inputs) -> Inputs:
    """As a model leaves them; contiguous for the products alone, or torch.matmul's copies would be timed too."""
    return inputs.contiguous() if impl == "products" else inputs


def _weigh(case, impl, inputs, run, common, device) -> Row:
    columns = {**common, "rounds": 1, "note": ""}
    try:
        if device.type == "cuda":
            peak = peak_extra_bytes(partial(run, inputs), device)
        else:
            peak = peak_in_child(prepared, case, impl)
    except (RuntimeError, OSError) as failure:
        return Row(**columns | told(failure), metric="memory", unit="MiB")
    mebibytes = spread([peak / 2**20])
    return Row(**columns, metric="memory", unit="MiB", **mebibytes._asdict())


def prepared(case: Case, impl: str) -> Callable[[], object]:
    """For a child process: the case's inputs, everything loaded, and the run to weigh."""
    device = torch.device("cpu")
    inputs = make_inputs(case, device)
    run = step(impl, case.op, loss_of(impl, case.op), "fwd_bwd")
    # What is compiled for a shape is compiled before the run. The others keep scratch memory, which belongs to the run:
    # the case's own length or number of classes would put it there already.
    compiled = impl in ("compile", "flex", "liger")
    few = replace(small(case), length=min(case.length, 8), classes=min(case.classes, 8))
    run(inputs if compiled else make_inputs(few, device))
    return partial(run, inputs)
