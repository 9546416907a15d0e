"""Training: recipes of stages, the loop, checkpoints, metrics, evaluation and export."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Reading a recipe or a metric must not import the loop and what it stands on.
_LAZY = {
    "Recipe": "recipe",
    "Stage": "recipe",
    "Supervised": "supervised",
    "TrainResult": "loop",
    "distiller_for": "pipeline",
    "export": "exporting",
    "make_accelerator": "machine",
    "predict": "evaluate",
    "recipe_names": "recipe",
    "run_recipe": "pipeline",
    "train": "loop",
    "verify": "checkpoint",
}

__all__ = [
    "Recipe",
    "Stage",
    "Supervised",
    "TrainResult",
    "distiller_for",
    "export",
    "make_accelerator",
    "predict",
    "recipe_names",
    "run_recipe",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from bertkd.training.checkpoint import verify
    from bertkd.training.evaluate import predict
    from bertkd.training.exporting import export
    from bertkd.training.loop import TrainResult, train
    from bertkd.training.machine import make_accelerator
    from bertkd.training.pipeline import distiller_for, run_recipe
    from bertkd.training.recipe import Recipe, Stage, recipe_names
    from bertkd.training.supervised import Supervised


if not TYPE_CHECKING:  # a type checker would take it to have every name

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'bertkd.training' has no attribute {name!r}")
        return getattr(importlib.import_module(f"bertkd.training.{_LAZY[name]}"), name)
