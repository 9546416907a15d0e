"""Running a recipe's stages with progress that also reads well in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from bertkd.data import LengthBucketSampler
from bertkd.study.progress import Progress, Tick
from bertkd.study.workload import Workload
from bertkd.training import checkpoint
from bertkd.training.loop import TrainResult, train
from bertkd.training.machine import this_process
from bertkd.training.recipe import Stage
from bertkd.training.run_record import describe_data
from bertkd.training.schedule import stage_lengths

Curve = tuple[list[float], list[float]]


def stage_steps(stage: Stage, workload: Workload) -> int:
    """Updates the stage comes to on this data.

    Raises:
        ValueError: its warmup does not fit, or there is no data.
    """
    sampler = LengthBucketSampler(workload.train.lengths, stage.batch_size)
    return stage_lengths(stage, len(sampler)).total


@contextmanager
def ticking(module: nn.Module, steps: int, tick: Tick, *, start: int = 0) -> Iterator[None]:
    """Tell ``tick`` how far training is, each time ``module`` is run on a batch.

    Args:
        module: what the loop trains.
        steps: forward passes of the whole stage.
        tick: as ``Progress.phase`` gives it.
        start: forward passes that an earlier sitting did.
    """
    done = start

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        tick(min(1.0, done / steps), f"step {done} of {steps}")

    handle = module.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def run_stages(
    stages: Sequence[Stage],
    build: Callable[[Stage], nn.Module],
    workload: Workload,
    *,
    output_dir: Path,
    resume: bool | str = False,
    teacher_scores: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[TrainResult]:
    """Train through ``stages`` in order, each in its own folder ``<number>-<name>``.

    A terminal gets the loop's progress bar; a log gets a line with the time left now and then.

    Args:
        stages: what to do; a stage with a ``metric`` is evaluated on the validation split.
        build: stage to the module to train; all of them hold the same student.
        workload: data and judge.
        output_dir: parent of the stages' folders.
        resume: as ``train`` takes it.
        teacher_scores: the teacher's on the validation split, by name.
        settings: as ``train`` takes them; of a stage that is judged also what its validation rows are.
        options: everything else ``train`` takes, e.g. ``seed``, ``log_with``.
    """
    totals = [stage_steps(stage, workload) for stage in stages]
    bars = sys.stderr.isatty()
    progress = Progress(
        {stage.name: total for stage, total in zip(stages, totals, strict=True)},
        enabled=not bars and this_process().is_main_process,
    )
    results = []
    for number, (stage, total) in enumerate(zip(stages, totals, strict=True), start=1):
        module = build(stage)
        folder = output_dir / f"{number}-{stage.name}"
        done = max(checkpoint.checkpoints(folder), default=0)
        parts = stage.accumulate
        stated = dict(settings or {})
        if stage.metric and stage.eval_every and workload.task is not None:
            # Weights that were best on other rows must not stand against those of a later sitting.
            rows = workload.task.validation
            stated["validation"] = describe_data(rows, rows.lengths)
        with (
            progress.phase(stage.name) as tick,
            ticking(module, total * parts, tick, start=done * parts),
        ):
            result = train(
                module,
                stage,
                workload.train,
                output_dir=folder,
                collate=workload.collate,
                eval_fn=workload.judge("validation") if stage.metric else None,
                resume=resume,
                teacher_score=(teacher_scores or {}).get(stage.metric or ""),
                settings=stated,
                progress=bars,
                **options,
            )
        results.append(result)
    return results


def stage_facts(stages: tuple[Stage, ...]) -> dict[str, str]:
    """One line per stage for a card."""
    facts = {}
    for stage in stages:
        length = f"{stage.steps} updates" if stage.steps else f"{stage.epochs:g} epochs"
        facts[f"stage {stage.name}"] = (
            f"`{stage.objective}`, layer map {stage.layer_map}, {length} of {stage.batch_size}, "
            f"peak learning rate {stage.lr:g}, {stage.precision}"
        )
    return facts


def loss_curves(history: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Term -> (steps, values) from a stage's history; rows of evaluations are passed over."""
    other = {"step", "epoch", "lr", "loss", "grad_norm", "examples_per_second", "seconds"}
    return _curves(history, lambda name: name not in other and not name.startswith("eval_"))


def score_curves(history: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Score -> (steps, values) from the evaluations in a stage's history, without ``eval_``."""
    curves = _curves(history, lambda name: name.startswith("eval_"))
    return {name.removeprefix("eval_"): curve for name, curve in curves.items()}


def _curves(history: Sequence[dict[str, Any]], wanted: Callable[[str], bool]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for row in history:
        for name, value in row.items():
            if wanted(name) and value is not None:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves
