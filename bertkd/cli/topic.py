"""``bertkd study topic``: does distillation beat training on labels alone, and by how much?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Config:
    """Compare distilled with label-only students on pydocs-topic, over several seeds.

    A teacher is fine-tuned to its plateau; then students of the same initialisation are trained by kd
    alone, by att_kl and then kd, and on the labels alone, for the same number of updates each.

    Attributes:
        output_dir: Folder for the table, plot and results; new, empty, or an earlier study's, whose
            finished runs are kept.
        seeds: Number of students of each kind.
        teacher_steps: Updates of the teacher at most; it stops earlier at its plateau.
        student_steps: Updates of each student.
        recipe: Recipe with a teacher and two stages: a shipped one or a YAML file.
        model: Encoder to make the teacher of. Default: the demo's MiniLM-L6.
    """

    output_dir: str = "study-topic"
    seeds: int = 3
    teacher_steps: int = 1500
    student_steps: int = 600
    recipe: str = "pydocs-topic"
    model: str | None = None


def prepare(config: Config) -> Callable[[], None]:
    """Check the options; the result runs the study.

    Raises:
        ValueError: a wrong option, or several processes.
        ModuleNotFoundError: the default teacher is not installed.
    """
    from bertkd.study.demo import demo_teacher_dir
    from bertkd.study.files import check_output_dir
    from bertkd.study.topic import TopicStudy, run_topic
    from bertkd.training.machine import check_alone
    from bertkd.training.recipe import Recipe

    check_alone("study topic")
    for name in ("seeds", "teacher_steps", "student_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    recipe = Recipe.load(config.recipe)
    if recipe.teacher is None or len(recipe.stages) != 2 or recipe.task is None:
        raise ValueError(f"recipe={config.recipe!r} needs a task, a teacher and two stages.")
    study = TopicStudy(
        model=config.model or str(demo_teacher_dir()),
        recipe=recipe,
        output_dir=check_output_dir(config.output_dir, "study topic", reuse=True),
        seeds=config.seeds,
        teacher_steps=config.teacher_steps,
        student_steps=config.student_steps,
    )
    return lambda: run_topic(study)
