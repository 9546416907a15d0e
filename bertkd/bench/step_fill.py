"""The largest batch with which a training step fits on the GPU: eager's, and that of bertkd's fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from bertkd.bench.cases import Case
from bertkd.bench.op_cases import BASELINE, Settings
from bertkd.bench.record import Row
from bertkd.bench.spec import OURS
from bertkd.bench.step_cases import Trainer
from bertkd.bench.step_models import PAIRS
from bertkd.bench.timing import check_device, release_memory, told

MOST = 16384


def is_filled(case: Case, device: torch.device) -> bool:
    """Whether a case is one of the few whose largest batch is searched for, as that takes many steps."""
    important = case.importance == 1 and case.padding == "full"
    return device.type == "cuda" and case.op in PAIRS and not case.processes and important


def contestants(case: Case, rows: Sequence[Row], settings: Settings) -> list[str]:
    """Eager, also where the case itself did not fit, and the fastest of bertkd's by these rows."""
    times = {
        row.impl: row.p50
        for row in rows
        if row.metric == "time" and row.p50 is not None and Case.of(row).columns == case.columns
    }
    ours = sorted((impl for impl in times if impl in OURS), key=lambda impl: times[impl])
    eager = [BASELINE] if settings.selection.allows("impl", BASELINE) else []
    return eager + ours[:1]


def fill(case: Case, impls: Sequence[str], settings: Settings) -> Iterator[Row]:
    """A row of the metric "largest_batch" per contestant."""
    row = partial(Row, **case.columns, mode="step", metric="largest_batch", unit="sequences")
    for impl in impls:
        trainer: Trainer | None = None
        try:
            trainer = Trainer(case, impl, settings.device)
            largest = largest_that(partial(_fits, trainer), case.batch)
        except Exception as failure:  # whatever it does besides running out of memory
            yield row(impl=impl, **told(failure), **settings.stamp)
            check_device(settings.device)
        else:
            yield row(impl=impl, p50=largest, rounds=1, **settings.stamp)
        finally:
            trainer = None  # its memory is the next one's


def _fits(trainer: Trainer, batch: int) -> bool:
    release_memory()
    try:
        trainer.resize(batch)
        trainer()
        return True
    except RuntimeError as failure:
        if told(failure)["status"] == "oom":
            return False
        raise


def largest_that(fits: Callable[[int], bool], start: int, most: int = MOST) -> int:
    """Largest number up to ``most`` that fits, within an eighth: doubled from ``start``, then halved in between."""
    low, high = 0, min(max(start, 1), most)
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
