"""The optimiser, its learning-rate schedule, and how many updates a stage comes to."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from bertkd.training.recipe import Stage


@dataclass(frozen=True)
class Lengths:
    """A stage's lengths in updates; for the intervals 0 means: after the last update only."""

    total: int
    epoch: int
    warmup: int
    log_every: int
    save_every: int
    eval_every: int

    def logs(self, step: int) -> bool:
        """Whether a row of the history is due after update ``step``."""
        return self._due(step, self.log_every)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after update ``step``."""
        return self._due(step, self.save_every)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after update ``step``."""
        return self._due(step, self.eval_every)

    def _due(self, step: int, every: int) -> bool:
        return step > 0 and (step == self.total or (every > 0 and step % every == 0))


def stage_lengths(stage: Stage, steps_per_epoch: int) -> Lengths:
    """Work out a stage's lengths for data of ``steps_per_epoch`` updates.

    Raises:
        ValueError: the warmup does not fit into the stage.
    """
    # Rounded first: 1.1 epochs of 100 are 110.00000000000001 in floats, and are to be 110.
    total = stage.steps or math.ceil(round((stage.epochs or 0) * steps_per_epoch, 6)) or 1
    warmup = stage.warmup
    if isinstance(warmup, float):
        warmup = round(warmup * total)
    if warmup >= total and warmup > 0:
        raise ValueError(
            f"warmup must be shorter than the stage, got {warmup} updates of the {total} of stage "
            f"{stage.name!r}; give fewer, or a share of the stage such as 0.06"
        )

    def interval(every: int | str | None) -> int:
        return steps_per_epoch if every == "epoch" else int(every or 0)

    return Lengths(
        total=total,
        epoch=steps_per_epoch,
        warmup=warmup,
        log_every=stage.log_every,
        save_every=interval(stage.save_every),
        eval_every=interval(stage.eval_every),
    )


def build_optimizer(module: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what ``module`` trains, with no weight decay on biases and norms.

    ``module.parameter_groups(lr, weight_decay, projection_lr)`` decides where there is one.

    Raises:
        ValueError: nothing to train, or a weight of ``module.teacher`` among what is to be trained.
    """
    own_groups: Any = getattr(module, "parameter_groups", None)
    if own_groups is not None:
        groups = own_groups(
            lr=stage.lr, weight_decay=stage.weight_decay, projection_lr=stage.projection_lr
        )
    else:
        groups = _groups(module, stage)
    trained = {id(p) for group in groups for p in group["params"]}
    if not trained:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
    teacher = getattr(module, "teacher", None)
    if isinstance(teacher, nn.Module) and any(id(p) in trained for p in teacher.parameters()):
        raise ValueError(
            "the teacher's weights are among those to be trained; keep the teacher out of "
            "parameters() or freeze it"
        )
    # The fused step computes the same update in one visit of the weights; with fp16 the loss scaler must be
    # able to skip a step and say so, which needs the plain one.
    kinds = {p.device.type for group in groups for p in group["params"]}
    fused = kinds <= {"cuda", "cpu"} and stage.precision != "fp16"
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=fused)


def _groups(module: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    # Biases and the weights of norms are exactly the vectors of a Transformer.
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def advance(schedule: LRScheduler, skipped: bool) -> None:
    """Go to the next update's learning rate; a skipped update counts as one."""
    # Only then: afterwards Python shows again what it has shown before, so that a warning would come at every step.
    with warnings.catch_warnings() if skipped else nullcontext():
        if skipped:
            # PyTorch takes a first step that the loss scaler skipped for a forgotten one.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        schedule.step()


def build_schedule(optimizer: torch.optim.Optimizer, stage: Stage, lengths: Lengths) -> LRScheduler:
    """Linear warmup from 0, then ``stage.schedule`` down to 0 (polynomial: to ``stage.lr_end``)."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if stage.schedule == "constant" else stage.schedule
    extra = {"lr_end": stage.lr_end, "power": stage.power} if name == "polynomial" else None
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=lengths.warmup,
        num_training_steps=lengths.total,
        scheduler_specific_kwargs=extra,
    )
