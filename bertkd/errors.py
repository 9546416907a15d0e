"""Errors that say what was wrong and what to do about it, and the checks that many share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch


class UnsupportedEncoderError(ValueError):
    """The model's attention cannot be captured; the message lists what can."""


class CheckpointError(RuntimeError):
    """A checkpoint is truncated, foreign or missing; the message names it and the reason."""


class NonFiniteError(FloatingPointError):
    """A NaN or infinity appeared where training cannot go on; the message names the place."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: PyTorch's allocator on GPUs with a class of its own, the one on CPUs, drivers and
    compilers in words alone.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def unknown_name(kind: str, got: str, options: Iterable[str]) -> ValueError:
    """Build the error for a name that is not among ``options``, suggesting the nearest one.

    Args:
        kind: what the name stands for, e.g. ``"term"``.
        got: the name as the user wrote it.
        options: the names that would have been accepted.

    Returns:
        A ``ValueError`` for the caller to raise.
    """
    names = sorted(options)
    close = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {got!r}.{hint} Known: {', '.join(names)}.")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int, NumPy's integers included; ``name`` is the argument it was given as.

    Raises:
        TypeError: if it is anything else, ``True`` and ``2.0`` included.
        ValueError: if it is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)
