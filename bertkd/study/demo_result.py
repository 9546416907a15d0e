"""What the demo found, as plain values."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
import transformers

import bertkd
from bertkd.study.costs import Costs
from bertkd.training.recipe import Recipe


@dataclass
class SeedResult:
    """One run of the demo: scores on the test split, and how the training went."""

    seed: int
    scores: dict[str, float]
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)


@dataclass
class DemoResult:
    """Everything the demo found; all of it measured in this run.

    Attributes:
        recipe: what was run.
        queries: number of held-out queries, and of documents to choose from.
        texts: number of training texts.
        teacher, undistilled: scores on the test split.
        curve_teacher, curve_start: scores on the small set that the curves are drawn with.
        costs: parameters, latency, memory of the loss.
        runs: one per seed.
        seconds: of everything, reading included.
    """

    recipe: Recipe
    queries: int
    texts: int
    teacher: dict[str, float]
    undistilled: dict[str, float]
    curve_teacher: dict[str, float]
    curve_start: dict[str, float]
    costs: Costs
    runs: list[SeedResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kept_mrr(self) -> float:
        """Share of the teacher's MRR that the students keep, mean over seeds."""
        return fmean(run.scores["mrr"] for run in self.runs) / self.teacher["mrr"]

    @property
    def spearman(self) -> float:
        """The students' rank correlation with the teacher, mean over seeds."""
        return fmean(run.scores["spearman"] for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``results.json``."""
        return {
            **asdict(self),
            "recipe": {
                "layers": self.recipe.layers,
                "max_length": self.recipe.max_length,
                "stages": [stage.to_dict() for stage in self.recipe.stages],
            },
            "kept_mrr": self.kept_mrr,
            "mean_spearman": self.spearman,
            "speedup": self.costs.speedup,
            "versions": {
                "bertkd": bertkd.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
