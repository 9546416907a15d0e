"""bertkd: distil BERT-family encoders by what happens inside them, without building attention maps."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bertkd.ops.dispatch import explain

__version__ = "0.1.0"

# Importing the losses must not import transformers: what needs it is loaded on first use.
_LAZY = {
    "Capture": "bertkd.capture",
    "Recording": "bertkd.capture",
    "Distiller": "bertkd.distiller",
    "create_student": "bertkd.student",
    "functional": "bertkd.functional",
    "modules": "bertkd.modules",
    "PRESETS": "bertkd.objectives",
    "use_cpu_attention": "bertkd.cpu_attention",
}

__all__ = [
    "PRESETS",
    "Capture",
    "Distiller",
    "Recording",
    "create_student",
    "explain",
    "functional",
    "modules",
    "use_cpu_attention",
]

if TYPE_CHECKING:
    from bertkd import functional, modules
    from bertkd.capture import Capture, Recording
    from bertkd.cpu_attention import use_cpu_attention
    from bertkd.distiller import Distiller
    from bertkd.objectives import PRESETS
    from bertkd.student import create_student


if not TYPE_CHECKING:  # a type checker would take it to have every name

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'bertkd' has no attribute {name!r}")
        module = importlib.import_module(_LAZY[name])
        return module if _LAZY[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
