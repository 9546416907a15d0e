"""Run a training-step case: compare losses and gradients, then time, weigh and fill the memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from bertkd.bench import memory
from bertkd.bench.cases import Case
from bertkd.bench.contestants import OURS, wrong_device
from bertkd.bench.op_cases import BASELINE, Settings, first_line
from bertkd.bench.record import Row
from bertkd.bench.step_cases import Trainer, prepared
from bertkd.bench.timing import check_device, interleaved, ratios, release_memory, spread
from bertkd.ops.dispatch import unavailable
from bertkd.ops.verify import relative_error

CONTESTANTS = (BASELINE, *OURS)
# Whole networks in bfloat16 differ by their own rounding, which depends on the attention kernel.
LIMITS = {"float32": (1e-3, 2e-2), "bfloat16": (5e-2, 0.5)}


def run_step(case: Case, settings: Settings) -> Iterator[Row]:
    """All rows of a step case."""
    if not settings.selection.allows("mode", "step"):
        return
    row = partial(Row, **case.columns, mode="step", **settings.stamp)
    trainers: dict[str, Trainer] = {}
    errors: dict[str, float] = {}
    yardstick = Yardstick(case, settings.device)
    for impl in CONTESTANTS:
        # The baseline always runs: a speed-up needs it in the same rounds.
        if impl != BASELINE and not settings.selection.allows("impl", impl):
            continue
        status, note = "ok", ""
        release_memory()
        try:
            reason = (
                None
                if impl == BASELINE
                else unavailable(impl) or wrong_device(impl, settings.device)
            )
            if reason is None:
                trainer = Trainer(case, impl, settings.device)
                trainer()
                errors[impl], wrong = yardstick.judge(trainer)
                trainers[impl] = trainer
                if wrong:
                    status, note = "red", wrong
                    del trainers[impl]
            else:
                status, note = "unavailable", reason
        except torch.OutOfMemoryError:
            status, note = "oom", "out of memory"
        except Exception as failure:  # a contestant's failure is its own, the others go on
            refused = str(failure).startswith(f"impl={impl!r} cannot run")
            status = "unavailable" if refused else "error"
            note = (
                first_line(failure)
                if refused
                else f"{type(failure).__name__}: {first_line(failure)}"
            )
        if status != "ok":
            yield row(impl=impl, metric="time", unit="ms", status=status, note=note)
        if status == "error":
            check_device(settings.device)
    yield from _measure(case, trainers, errors, row, settings)


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
    times = interleaved(
        trainers, rounds=settings.rounds, seconds=settings.seconds, synchronise=wait
    )
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
    names = [impl for impl in trainers if settings.selection.allows("impl", impl)]
    # Eager's largest batch is worth knowing even where this one did not fit.
    filled = [BASELINE] if settings.selection.allows("impl", BASELINE) else []
    ours = [impl for impl in names if impl != BASELINE]
    filled += sorted(ours, key=lambda impl: statistics.median(times[impl]))[:1]
    if settings.weigh and on_cuda:
        for impl in names:
            peak = memory.peak_on_cuda(trainers[impl], settings.device)
            yield row(impl=impl, metric="memory", unit="MiB", p50=peak / 2**20, rounds=1)
    trainers.clear()
    release_memory()
    if settings.weigh and not on_cuda:
        yield from _weigh(case, names, row)
    if settings.fill and on_cuda:
        yield from _fill(case, filled, row, settings)


def _weigh(case, names, row) -> Iterator[Row]:
    for impl in names:
        try:
            peak = memory.peak_in_child(prepared, case, impl)
            yield row(impl=impl, metric="memory", unit="MiB", p50=peak / 2**20, rounds=1)
        except (RuntimeError, OSError) as failure:
            note = first_line(failure)
            yield row(impl=impl, metric="memory", unit="MiB", status="error", note=note)


def _fill(case, names, row, settings) -> Iterator[Row]:
    """Largest batch that fits; for the first cases only, as it takes many steps."""
    if case.importance > 1 or case.padding != "full":
        return
    for impl in names:
        trainer: Trainer | None = None
        try:
            trainer = Trainer(case, impl, settings.device)
            largest = largest_that(partial(_fits, trainer), case.batch)
        except Exception as failure:  # whatever a batch too large does but run out of memory
            note = f"{type(failure).__name__}: {first_line(failure)}"
            yield row(
                impl=impl, metric="largest_batch", unit="sequences", status="error", note=note
            )
            check_device(settings.device)
        else:
            yield row(impl=impl, metric="largest_batch", unit="sequences", p50=largest, rounds=1)
        finally:
            trainer = None  # its memory is the next one's


def _fits(trainer: Trainer, batch: int) -> bool:
    release_memory()
    try:
        trainer.resize(batch)
        trainer()
        return True
    except torch.OutOfMemoryError:
        return False


def largest_that(fits, start: int, most: int = 16384) -> int:
    """Largest number that fits, within an eighth: doubled from ``start``, then halved in between."""
    low, high = 0, max(start, 1)
    while high <= most and fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
