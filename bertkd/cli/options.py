"""Options that several commands share, and what they mean for data and recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from bertkd.study.workload import Workload
    from bertkd.training.recipe import Recipe, Stage


@dataclass(kw_only=True)
class TaskOptions:
    """Data

    Attributes:
        task: GLUE task (rte, sst2, ...), pydocs-topic, pydocs-match, pydocs-retrieval, or a CSV, TSV,
            JSON Lines or Parquet file or a folder of them. Default: the recipe's, where one is given.
        text_column: Local files: column of the text. Default: guessed from common names.
        pair_column: Local files: column of the second text of a pair. Default: single texts.
        label_column: Local files: column of the label. Default: guessed from common names.
        validation_path: Local files: validation data. Default: a folder's file of that name, or held out.
        test_path: Local files: test data.
        glue_dir: Folder with GLUE's files. Default: the Hugging Face Hub.
    """

    task: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    validation_path: str | None = None
    test_path: str | None = None
    glue_dir: str | None = None

    def workload(self, task: str, tokenizer: Any, max_length: int, **more: Any) -> Workload:
        """Load the task; ``task`` is what these options or the recipe name, ``more`` is for ``load_task``."""
        from bertkd.study.workload import load_workload

        columns = {f.name: getattr(self, f.name) for f in fields(TaskOptions) if f.name != "task"}
        return load_workload(task, tokenizer, max_length, **columns | more)


@dataclass(kw_only=True)
class StageOptions:
    """Training (what is not given comes from the recipe)

    Attributes:
        steps: Optimiser updates; replaces the recipe's epochs.
        epochs: Passes over the data; replaces the recipe's steps.
        batch_size: Examples per update.
        accumulate: Micro-batches per update; more of them need less memory.
        lr: Peak learning rate.
        warmup: Updates of linear warmup, or a share of all updates below 1.
        weight_decay: Of weight matrices.
        schedule: Of the learning rate after the warmup.
        precision: Of the forward pass.
        eval_every: Updates between evaluations, or "epoch".
        save_every: Updates between checkpoints, or "epoch".
        patience: Stop a stage that is evaluated after so many evaluations without a better score.
        restore: Weights that a stage which is evaluated ends with.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    lr: float | None = None
    warmup: int | float | None = None
    weight_decay: float | None = None
    schedule: Literal["linear", "polynomial", "cosine", "constant"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    eval_every: int | Literal["epoch"] | None = None
    save_every: int | Literal["epoch"] | None = None
    patience: int | None = None
    restore: Literal["best", "last"] | None = None

    def given(self) -> dict[str, Any]:
        """The fields of a ``Stage`` that were given, except ``patience``; see ``patient``."""
        names = [f.name for f in fields(StageOptions) if f.name != "patience"]
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def patient(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """The stages, with ``patience`` in those that turned out to be judged by a metric.

        Raises:
            ValueError: none of them is, or ``patience`` is not positive.
        """
        if self.patience is None:
            return tuple(stages)
        judged = [stage.metric is not None and stage.eval_every is not None for stage in stages]
        if not any(judged):
            raise ValueError(
                f"patience={self.patience} counts evaluations, and no stage is evaluated here: leave it out, or "
                "give data with labels and an objective that trains the task head."
            )
        return tuple(
            replace(stage, patience=self.patience) if counts else stage
            for stage, counts in zip(stages, judged, strict=True)
        )


@dataclass(kw_only=True)
class RunOptions:
    """Run

    Attributes:
        output_dir: Folder for checkpoints, the finished model and results; new or empty.
        max_length: Tokens per example at most. Default: the recipe's.
        seed: Of the order of the data, dropout and new weights. Default: the recipe's.
        log_with: Trackers of Accelerate's, e.g. tensorboard, wandb; "none" for no tracker.
        torch_compile: Compile the networks with torch.compile. Meant for GPUs: on CPUs steps took longer.
        resume: Go on with the run in output_dir; "last-good" also steps back over damaged checkpoints.
        dry_run: Check everything, print the plan, train nothing.
    """

    output_dir: str
    max_length: int | None = None
    seed: int | None = None
    log_with: str = "tensorboard"
    torch_compile: bool = False
    resume: bool | Literal["last-good"] = False
    dry_run: bool = False

    def trackers(self) -> str | None:
        """``log_with`` as ``train`` takes it."""
        return None if self.log_with == "none" else self.log_with

    def check_machine(self, stages: Iterable[Stage]) -> None:
        """Refuse trackers and precisions that could not be had here, before anything is loaded.

        Raises:
            ValueError: an unknown tracker or one that is not installed, or fp16 without a GPU.
        """
        from bertkd.training.machine import check_machine

        for stage in stages:
            try:
                check_machine(stage.precision, self.trackers())
            except ImportError as error:  # of the user's choice, so not a broken installation
                raise ValueError(str(error)) from error


def overridden(recipe: Recipe, stage: StageOptions, run: RunOptions) -> Recipe:
    """The recipe with every option that was given in place of its own value, except ``patience``.

    Raises:
        ValueError: a value that makes no sense.
    """
    if run.seed is not None and not 0 <= run.seed < 2**32:
        raise ValueError(f"seed must lie between 0 and 2^32 - 1, got {run.seed}.")
    changes = {name: getattr(run, name) for name in ("max_length", "seed")}
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(recipe.with_stages(**stage.given()), **changes)


def task_of(options: TaskOptions, recipe: Recipe) -> str:
    """The task that the options or else the recipe name.

    Raises:
        ValueError: neither does.
    """
    task = options.task or recipe.task
    if task is None:
        raise ValueError(
            "no data: give --task (a task's name or a file; distill takes --text too), or a recipe that has a task."
        )
    return task
