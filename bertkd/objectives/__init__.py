"""Objectives: named terms, their sums as text, presets, and building them for two models."""

from bertkd.objectives import (  # noqa: F401  (each registers its terms)
    terms_attention,
    terms_contrast,
    terms_hidden,
    terms_logits,
    terms_pearson,
    terms_relations,
    terms_sentence,
)
from bertkd.objectives.base import (
    TERMS,
    Needs,
    StepContext,
    Term,
    option_names,
    register_term,
)
from bertkd.objectives.build import Objective, build_objective, read_objective
from bertkd.objectives.expression import Expression, TermSpec, parse
from bertkd.objectives.presets import PRESETS, Preset

__all__ = [
    "PRESETS",
    "TERMS",
    "Expression",
    "Needs",
    "Objective",
    "Preset",
    "StepContext",
    "Term",
    "TermSpec",
    "build_objective",
    "option_names",
    "parse",
    "read_objective",
    "register_term",
]
