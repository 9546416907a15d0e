"""``bertkd finetune``: a task's teacher from a pretrained encoder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertkd.cli.options import RunOptions, StageOptions, TaskOptions, overridden, task_of

if TYPE_CHECKING:
    from bertkd.training.recipe import Recipe


@dataclass(kw_only=True)
class Config(TaskOptions, StageOptions, RunOptions):
    """Fine-tune an encoder on a labelled task, so that it can teach.

    Without a recipe: 3 epochs of batches of 32 with a peak learning rate of 5e-5.

      bertkd finetune --model roberta-base --recipe rte --output_dir runs/rte-teacher
      bertkd finetune --model roberta-base --task reviews.csv --output_dir runs/reviews-teacher

    Attributes:
        model: Pretrained encoder: a folder, or a name on the Hugging Face Hub.
        recipe: Shipped recipe (rte, sst2, ...) or YAML file; its "teacher" stage is run.
    """

    model: str
    recipe: str | None = None


def prepare(config: Config) -> Callable[[], None]:
    """Load and check everything; the result trains.

    Raises:
        ValueError, FileNotFoundError: whatever cannot work, by the name of its option.
    """
    from bertkd.compiling import compile_in_place
    from bertkd.plan import count_parameters
    from bertkd.study.files import check_output_dir
    from bertkd.study.jobs import Job, run_job
    from bertkd.study.models import label_config, load_model, load_tokenizer
    from bertkd.study.stages import stage_steps
    from bertkd.training.machine import this_process
    from bertkd.training.run_record import identity
    from bertkd.training.supervised import Supervised

    check_output_dir(config.output_dir, "finetune", reuse=bool(config.resume))
    recipe = _recipe(config)
    config.check_machine(recipe.stages)
    tokenizer = load_tokenizer(config.model, "model")
    workload = config.workload(task_of(config, recipe), tokenizer, recipe.max_length)
    if workload.task is None:
        raise ValueError(f"task={workload.name!r} has no labels to fine-tune on.")
    stage = recipe.stages[0]
    if stage.metric is None:
        stage = dataclasses.replace(stage, metric=workload.metric)
    workload.check_metric(stage)
    (stage,) = config.patient([stage])
    labels = label_config(workload.task)
    model = load_model(config.model, "model", "labels", seed=recipe.seed, **labels)
    _warn_if_it_cannot_teach(config.model, model)
    settings = {"model": identity(model)}
    if config.torch_compile:
        compile_in_place(model)
    job = Job(
        command="finetune",
        source=config.model,
        student=model,
        tokenizer=tokenizer,
        stages=(stage,),
        build=lambda _: Supervised(model),
        workload=workload,
        output_dir=Path(config.output_dir),
        settings=settings,
        seed=recipe.seed,
        resume=config.resume,
        log_with=config.trackers(),
    )
    this_process().print(
        f"task {workload.name}: {len(workload.train):,} training rows, {workload.task.num_labels} "
        f"labels\nmodel {config.model}: {count_parameters(model):,} parameters\n"
        f"{stage_steps(stage, workload):,} updates of {stage.batch_size} examples"
    )
    return (lambda: None) if config.dry_run else lambda: run_job(job)


def _warn_if_it_cannot_teach(name: str, model: Any) -> None:
    """Say so before the hours of a training, not at the distillation after them."""
    from bertkd.encoders import describe
    from bertkd.errors import UnsupportedEncoderError

    try:
        describe(model)
    except UnsupportedEncoderError as error:
        warnings.warn(f"model={name!r} can be fine-tuned, but not distilled: {error}", stacklevel=2)


def _recipe(config: Config) -> Recipe:
    from bertkd.training.recipe import Recipe, Stage

    if config.recipe is None:
        stage = Stage(name="teacher", objective="ce", epochs=3)
        return overridden(Recipe(stages=(stage,)), config, config)
    recipe = Recipe.load(config.recipe)
    if recipe.teacher is None:
        raise ValueError(f"recipe={config.recipe!r} does not say how its teacher is trained.")
    return overridden(dataclasses.replace(recipe, stages=(recipe.teacher,)), config, config)
