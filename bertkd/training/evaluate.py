"""Evaluation: a model's predictions on a data set, and what a score means for the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn

from bertkd.errors import unknown_name, whole_number
from bertkd.objectives.sides import accepted
from bertkd.training.recipe import Stage
from bertkd.training.rng import kept_rng
from bertkd.training.snapshot import TrainState
from bertkd.training.stream import Collate, example_lengths
from bertkd.training.tracking import finite

EvalFn = Callable[[nn.Module], Mapping[str, float]]

logger = logging.getLogger(__name__)


def student_of(module: nn.Module) -> nn.Module:
    """What evaluation and export see of a trained module: its ``student``, or itself."""
    return getattr(module, "student", module)


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Any,
    collate: Collate,
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run ``model`` over ``data`` on the device it is on, longest examples first.

    Args:
        model: a Hugging Face model with a task head; its mode is kept.
        data: examples with ``input_ids``.
        collate: examples to a batch.
        batch_size: examples per forward pass, 1 or more.
        autocast: run the forward in this dtype; None in the weights' own.

    Returns:
        Logits (N, C), or (N, L, C) of tokens, in fp32 and labels (N,) or (N, L), None where there are none,
        in the order of ``data``.

    Raises:
        TypeError, ValueError: ``data`` is no sequence of examples, or empty; a ``batch_size`` below 1; a
            ``model`` that gives no logits, or those of tokens in batches of different lengths.
    """
    whole_number("batch_size", batch_size, least=1)
    lengths = example_lengths(data, "data")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits, labels = [], []
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([data[row] for row in order[start : start + batch_size]])
            if "labels" in batch:
                labels.append(batch["labels"].cpu())
            inputs = {k: v for k, v in accepted(model, batch).items() if k != "labels"}
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                output = model(**send_to_device(inputs, device))
            if getattr(output, "logits", None) is None:
                raise TypeError(
                    f"model is a {type(model).__name__}, which gives no logits; load it with a task "
                    "head, e.g. AutoModelForSequenceClassification"
                )
            logits.append(output.logits.float().cpu())
    finally:
        model.train(was_training)
    sizes = sorted({tuple(part.shape[1:]) for part in logits})
    if len(sizes) > 1:
        raise ValueError(
            f"model is a {type(model).__name__}, whose logits have other sizes in every batch ({sizes[0]} and "
            f"{sizes[-1]} an example): pad all examples to one length in collate, e.g. with padding='max_length'"
        )
    back = np.argsort(order)
    found = torch.cat(logits).numpy()[back]
    return found, torch.cat(labels).numpy()[back] if labels else None


def run_eval(accelerator: Accelerator, module: nn.Module, eval_fn: EvalFn) -> dict[str, float]:
    """``eval_fn(student)`` in eval mode, without gradients and without a trace in the generators.

    Every process evaluates; the main process's numbers count, so that all stop or go on together.

    Raises:
        TypeError: ``eval_fn`` gave something else than numbers by name.
    """
    module.eval()
    try:
        with torch.no_grad(), kept_rng():
            result = eval_fn(student_of(module))
    finally:
        module.train()
    if not isinstance(result, Mapping):
        raise TypeError(
            f"eval_fn must return metrics by name, e.g. {{'accuracy': 0.9}}, got {result!r}"
        )
    metrics = {}
    for name, value in result.items():
        try:
            metrics[name] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"eval_fn's {name!r} must be a number, got {value!r}") from error
    if accelerator.num_processes > 1:
        metrics = broadcast_object_list([metrics])[0]
    return metrics


def check_judged(stage: Stage, eval_fn: EvalFn | None) -> None:
    """Refuse a stage that is to be judged by a metric that nobody computes.

    Raises:
        ValueError: ``stage.metric`` is given, but no ``eval_fn``.
    """
    if stage.metric is not None and stage.eval_every is not None and eval_fn is None:
        raise ValueError(
            f"stage {stage.name!r} picks its best weights by metric={stage.metric!r}, but there is no "
            "eval_fn to compute it; pass one, or give the stage metric=None or eval_every=None"
        )


def note(
    state: TrainState, metrics: dict[str, float], stage: Stage, teacher_score: float | None
) -> None:
    """Enter an evaluation of the present step into ``state``: best so far, patience, teacher passed.

    Raises:
        ValueError: ``stage.metric`` is not among the results.
    """
    state.metrics = {name: finite(value) for name, value in metrics.items()}
    if stage.metric is None:
        return
    if stage.metric not in metrics:
        raise unknown_name("metric", stage.metric, metrics)
    score = state.metrics[stage.metric]
    if score is None:
        logger.warning(
            "step %d: %s is %s, which counts as no better than before",
            state.step,
            stage.metric,
            metrics[stage.metric],
        )
    sign = 1 if stage.maximize else -1
    if score is not None and (state.best_metric is None or sign * (score - state.best_metric) > 0):
        if teacher_score is not None:
            _warn_if_overtaken(state, stage, score, sign, teacher_score)
        state.best_metric, state.best_step, state.bad_evals = score, state.step, 0
    else:
        state.bad_evals += 1
    state.stopped = stage.patience is not None and state.bad_evals >= stage.patience


def _warn_if_overtaken(
    state: TrainState, stage: Stage, score: float, sign: int, teacher_score: float
) -> None:
    before = state.best_metric
    was_behind = before is None or sign * (before - teacher_score) <= 0
    if was_behind and sign * (score - teacher_score) > 0:
        logger.warning(
            "step %d: the student's %s (%.4g) overtakes its teacher's (%.4g); a teacher trained "
            "longer may have more to teach",
            state.step,
            stage.metric,
            score,
            teacher_score,
        )
