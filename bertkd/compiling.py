"""``torch.compile`` for networks that run in several ways."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from bertkd.encoders import unwrap

# Teacher and student share their code, and every way to run it counts: blocks that are captured, with and without
# pads, in training and in evaluation, a first length and any length. PyTorch gives up after 8 and runs uncompiled.
_GRAPHS = 64


def compile_in_place(*models: nn.Module, **options: Any) -> None:
    """Compile each model as a whole, without renaming its weights; one that is compiled already is left alone.

    Args:
        models: any modules.
        options: as ``torch.compile`` takes them, e.g. ``dynamic``, ``mode``, ``backend``.
    """
    for model in models:
        inner = unwrap(model)
        if not hasattr(model, "_orig_mod") and inner._compiled_call_impl is None:
            inner.compile(**options)
    allow_graphs(*models)


def allow_graphs(*models: nn.Module) -> None:
    """Let PyTorch keep a graph for every way in which these models run, where one of them is compiled."""
    # Whoever has compiled anything has imported it; asked at every step, so the cheapest question comes first.
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or dynamo.config.recompile_limit >= _GRAPHS:
        return
    if any(map(is_compiled, models)):
        dynamo.config.recompile_limit = _GRAPHS


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` runs ``model``, or the encoder inside it, as a whole."""
    inner: Any = unwrap(model)
    encoder = getattr(inner, getattr(inner, "base_model_prefix", ""), inner)
    wrappers = (model, getattr(model, "module", model), encoder)
    return any(hasattr(x, "_orig_mod") for x in wrappers) or any(
        x._compiled_call_impl is not None for x in (inner, unwrap(encoder))
    )
