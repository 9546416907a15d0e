"""Run a training-step case: compare losses and gradients, then time and weigh."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import torch

from bertkd.bench.cases import Case
from bertkd.bench.contestants import OURS, wrong_device
from bertkd.bench.memory import peak_in_child
from bertkd.bench.op_cases import BASELINE, Settings
from bertkd.bench.record import Row
from bertkd.bench.step_cases import Trainer, prepared
from bertkd.bench.timing import (
    Failures,
    check_device,
    first_line,
    interleaved,
    ratios,
    release_memory,
    spread,
    told,
)
from bertkd.ops.implementations import unavailable
from bertkd.ops.verify import relative_error
from bertkd.study.memory import peak_extra_bytes

CONTESTANTS = (BASELINE, *OURS)
# Whole networks in bfloat16 differ by their own rounding, which depends on the attention kernel.
LIMITS = {"float32": (1e-3, 2e-2), "bfloat16": (5e-2, 0.5)}


def run_step(case: Case, settings: Settings) -> Iterator[Row]:
    """All rows of a step case."""
    if not settings.selection.allows("mode", "step"):
        return
    row = partial(Row, **case.columns, mode="step", **settings.stamp)
    trainers, errors = yield from _admitted(case, settings, row)
    if any(settings.selection.allows("impl", impl) for impl in trainers):
        yield from _measure(case, trainers, errors, row, settings)


def _admitted(case, settings, row) -> Generator[Row, None, tuple[dict[str, Trainer], dict]]:
    """Rows of those who cannot take part; trainers that give what eager gives, and by how much they are off."""
    trainers: dict[str, Trainer] = {}
    errors: dict[str, float] = {}
    yardstick = Yardstick(case, settings.device)
    for impl in CONTESTANTS:
        # The baseline always runs: a speed-up needs it in the same rounds.
        if impl != BASELINE and not settings.selection.allows("impl", impl):
            continue
        release_memory()
        found = _admit(impl, case, yardstick, settings.device)
        if isinstance(found, dict):
            yield row(impl=impl, metric="time", unit="ms", **found)
            if found["status"] == "error":
                check_device(settings.device)
        else:
            trainers[impl], errors[impl] = found
    return trainers, errors


def _admit(
    impl: str, case: Case, yardstick: Yardstick, device: torch.device
) -> tuple[Trainer, float] | dict[str, Any]:
    """A contestant's trainer and its error, or why it cannot take part, as status and note of a row."""
    if impl != BASELINE and (reason := unavailable(impl) or wrong_device(impl, device)):
        return {"status": "unavailable", "note": reason}
    try:
        trainer = Trainer(case, impl, device)
        trainer()
        error, wrong = yardstick.judge(trainer)
    except Exception as failure:  # a contestant's failure is its own, the others go on
        if str(failure).startswith(f"impl={impl!r} cannot run"):
            return {"status": "unavailable", "note": first_line(failure)}
        return told(failure)
    return (trainer, error) if wrong is None else {"status": "red", "note": wrong}


class Yardstick:
    """Loss and gradients of eager, on the first batch or, where that does not fit, on one short sequence."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.dtype = case.dtype
        self.cut: int | None = None
        trainer = Trainer(case, BASELINE, device)
        try:
            self.wanted = trainer.probe()
        except torch.OutOfMemoryError:
            self.cut = 1024
        if self.cut is not None:
            release_memory()
            self.wanted = trainer.probe(self.cut)

    def judge(self, trainer: Trainer) -> tuple[float, str | None]:
        """Largest relative error of a trainer, and what is wrong or None."""
        return compare(trainer.probe(self.cut), self.wanted, self.dtype)


def compare(found: list, wanted: list, dtype: str) -> tuple[float, str | None]:
    """Largest relative error of loss and gradients against eager's, and what is wrong or None."""
    worst = 0.0
    for what, got, want, limit in zip(
        ("loss", "gradients"), found, wanted, LIMITS[dtype], strict=True
    ):
        if got.shape != want.shape:
            return worst, "another set of parameters has gradients than with eager"
        error = relative_error(got, want)
        worst = max(worst, error)
        if not error <= limit:
            return worst, f"{what} is off eager's by {error:.1e} (limit {limit:.0e})"
    return worst, None


def _measure(case, trainers, errors, row, settings) -> Iterator[Row]:
    on_cuda = settings.device.type == "cuda"
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    failures = Failures(settings.device)

    def drop(impl: str, failure: Exception) -> None:
        """Together they may need more memory than each alone."""
        del trainers[impl]
        failures(impl, failure)

    try:
        times = interleaved(
            trainers,
            rounds=settings.rounds,
            seconds=settings.seconds,
            synchronise=wait,
            on_failure=drop,
        )
    finally:
        for impl, found in failures.found.items():
            yield row(impl=impl, metric="time", unit="ms", **found)
    for impl, trainer in trainers.items():
        if not settings.selection.allows("impl", impl):
            continue
        # Where lengths differ a call makes a step with each of several batches.
        steps = len(trainer.batches)
        seconds = [s / steps for s in times[impl]]
        common = partial(row, impl=impl, rounds=len(seconds), error=errors.get(impl))
        yield common(metric="time", unit="ms", **spread([s * 1e3 for s in seconds])._asdict())
        per_second = spread([trainer.tokens / steps / s for s in seconds])
        yield common(metric="throughput", unit="tokens/s", **per_second._asdict())
        if impl != BASELINE and BASELINE in times:
            gain = spread(ratios(times[BASELINE], times[impl]))
            yield common(metric="speedup", unit="x", against=BASELINE, **gain._asdict())
    if settings.weigh:
        names = [impl for impl in trainers if settings.selection.allows("impl", impl)]
        yield from _weigh(case, names, trainers, row, settings.device)


def _weigh(case, names, trainers, row, device) -> Iterator[Row]:
    """Peak memory: of the trainers that are there on a GPU, of new ones in processes of their own on a CPU."""
    if device.type != "cuda":
        trainers.clear()
    for impl in names:
        measured = partial(row, impl=impl, metric="memory", unit="MiB")
        try:
            if device.type == "cuda":
                peak = peak_extra_bytes(trainers[impl], device)
            else:
                peak = peak_in_child(prepared, case, impl)
            yield measured(p50=peak / 2**20, rounds=1)
        except (RuntimeError, OSError) as failure:
            yield measured(**told(failure))
