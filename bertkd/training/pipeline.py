"""A whole recipe: its stages in order, each on the student the one before left."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from bertkd.distiller import Distiller
from bertkd.training import checkpoint
from bertkd.training.evaluate import check_judged
from bertkd.training.loop import TrainResult, train
from bertkd.training.recipe import Recipe, Stage
from bertkd.training.schedule import stage_lengths
from bertkd.training.stream import Collate, count_examples

logger = logging.getLogger(__name__)

Build = Callable[[Stage], nn.Module]


def run_recipe(
    recipe: Recipe,
    build: Build,
    train_data: Any,
    *,
    output_dir: str | Path,
    collate: Collate,
    resume: bool | str = False,
    **options: Any,
) -> list[TrainResult]:
    """Train through all stages of ``recipe``.

    Args:
        recipe: its stages and its seed are used; making data and student of it is the caller's.
        build: the module to train in a stage; the student it holds must be the same object in each,
            e.g. ``distiller_for(teacher, student, num_examples=len(train_data))``.
        train_data: as for ``train``.
        output_dir: gets a folder ``1-<name>``, ``2-<name>``, ... per stage.
        collate: as for ``train``.
        resume: False; True goes through the stages again, past those that are done; ``"last-good"``
            also steps back over damaged checkpoints.
        options: everything else ``train`` takes, e.g. ``eval_fn``, ``log_with``, ``teacher_score``.

    Returns:
        One result per stage. The student is left with the last stage's weights.

    Raises:
        ValueError: before the first stage is trained, where one does not fit data or options, or where
            its folder is in use; else as ``train``.
    """
    if resume not in (True, False, "last-good"):
        raise ValueError(f"resume must be True, False or 'last-good' for a recipe, got {resume!r}")
    examples = count_examples(train_data)
    folders = [Path(output_dir) / f"{n}-{s.name}" for n, s in enumerate(recipe.stages, start=1)]
    for stage, folder in zip(recipe.stages, folders, strict=True):
        check_judged(stage, options.get("eval_fn"))
        stage_lengths(stage, math.ceil(examples / stage.batch_size))
        if resume is False:
            checkpoint.find(folder, resume)
    results = []
    for number, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True), start=1):
        logger.info(
            "stage %d of %d: %s: %s", number, len(recipe.stages), stage.name, stage.objective
        )
        results.append(
            train(
                build(stage),
                stage,
                train_data,
                output_dir=folder,
                collate=collate,
                resume=resume,
                seed=recipe.seed,
                **options,
            )
        )
    return results


def distiller_for(teacher: Any, student: Any, **options: Any) -> Build:
    """``build`` for ``run_recipe``: a ``Distiller`` with the stage's objective and layer map.

    Args:
        teacher, student: as ``Distiller`` takes them.
        options: the rest of what it takes, e.g. ``num_examples``, ``impl``, ``seed``.
    """

    def build(stage: Stage) -> nn.Module:
        return Distiller(teacher, student, stage.objective, layer_map=stage.layer_map, **options)

    return build
