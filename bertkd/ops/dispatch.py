"""Which implementation runs an op, and why."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from bertkd.errors import unknown_name

IMPLS = ("eager", "chunked", "native", "triton", "cuda")
ENVIRONMENT_VARIABLE = "BERTKD_IMPL"


class Choice(NamedTuple):
    """An implementation and the reason for it, as ``explain`` prints it."""

    impl: str
    reason: str


def unavailable(impl: str) -> str | None:
    """Why ``impl`` cannot run in this installation, or None if it can."""
    if impl in ("eager", "chunked"):
        return None
    if importlib.util.find_spec(f"bertkd.ops.{impl}") is None:
        return "this version has no such kernels yet"
    return None


def choose(
    op: str, device: torch.device, impl: str = "auto", eager_only: str | None = None
) -> Choice:
    """Pick the implementation of ``op`` for tensors on ``device``.

    Args:
        op: name of the op, for the message.
        device: where the tensors live.
        impl: the caller's wish; ``"auto"`` lets ``BERTKD_IMPL`` and then the defaults decide.
        eager_only: the argument that only ``eager`` implements, if the caller gave one.

    Raises:
        ValueError: for an unknown ``impl``, one that is not available, or one that lacks ``eager_only``.
    """
    source = f"impl={impl!r}"
    if impl == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        impl = os.environ[ENVIRONMENT_VARIABLE]
        source = f"{ENVIRONMENT_VARIABLE}={impl}"
    if impl == "auto":
        if eager_only is not None:
            return Choice("eager", f"{eager_only} is a parity switch that only eager implements")
        return Choice("chunked", f"the portable default on {device.type}")
    if impl not in IMPLS:
        raise unknown_name("impl", impl, ("auto", *IMPLS))
    reason = unavailable(impl)
    if reason is not None:
        raise ValueError(f"{source} cannot run {op}: {reason}. Use impl='auto' or 'chunked'.")
    if eager_only is not None and impl != "eager":
        raise ValueError(
            f"{source} does not implement {eager_only}, which reproduces the released code. "
            f"Use impl='eager' (or 'auto'), or leave {eager_only} out for the exact loss."
        )
    return Choice(impl, f"asked for by {source}")


def explain(op: str, *tensors: torch.Tensor, impl: str = "auto") -> str:
    """Say in one line which implementation would run ``op`` on these tensors, and why.

    Args:
        op: name of a loss, e.g. ``"attention_kl"``.
        *tensors: the loss's tensors; their device decides. Without any, the CPU is assumed.
        impl: as given to the loss.

    Raises:
        ValueError: if that implementation cannot run.

    Example:
        >>> explain("attention_kl", impl="eager")
        "attention_kl on cpu: eager (asked for by impl='eager')"
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    choice = choose(op, device, impl)
    return f"{op} on {device.type}: {choice.impl} ({choice.reason})"
