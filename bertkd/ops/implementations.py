"""The implementations by name: what there is, whether it can run here, and one voice for their warnings."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

IMPLS = ("eager", "chunked", "native", "triton", "cuda")

_warned: set[str] = set()


@cache
def implementation(impl: str) -> ModuleType:
    """The module with an implementation's ops; ``eager`` has none, the reference is differentiated by autograd."""
    return importlib.import_module(f"bertkd.ops.{impl}")


def unavailable(impl: str) -> str | None:
    """Why ``impl`` cannot run in this installation, or None if it can."""
    if impl in ("eager", "chunked"):
        return None
    return implementation(impl).unavailable()


def has_op(impl: str, op: str) -> bool:
    """Whether ``impl`` computes ``op`` at all; on which tensors, ``dispatch.resolve`` finds out."""
    return impl == "eager" or hasattr(implementation(impl), f"{op}_fwd_bwd")


def warn_once(message: str) -> None:
    """Warn, but not again for the same message in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
