"""Checks of single option values; the messages name the option."""

from __future__ import annotations

import math
from typing import Any

from bertkd.errors import unknown_name
from bertkd.ops.dispatch import ENVIRONMENT_VARIABLE, requested
from bertkd.ops.implementations import IMPLS, has_op, unavailable


def positive(name: str, value: Any) -> float:
    """Check an option that must be a finite number above 0.

    Raises:
        ValueError: it is not; the message names the option.
    """
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def not_negative(name: str, value: Any) -> float:
    """Check an option that must be a finite number, 0 or more.

    Raises:
        ValueError: it is not; the message names the option.
    """
    if not _is_finite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}")
    return float(value)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def chosen_impl(impl: str | None, default: str) -> str:
    """The implementation a term uses: its own option, or the objective's.

    Raises:
        ValueError: the name is unknown, or the implementation cannot run here.
    """
    chosen = default if impl is None else impl
    if chosen == "auto":
        return chosen
    if chosen not in IMPLS:
        raise unknown_name("impl", str(chosen), ("auto", *IMPLS))
    reason = unavailable(chosen)
    if reason is not None:
        raise ValueError(f"impl={chosen!r} cannot be used: {reason}; use 'auto' or 'chunked'")
    return chosen


def check_has_op(impl: str, op: str) -> None:
    """Check that the implementation a term uses, for "auto" that of ``BERTKD_IMPL``, has the op that it needs.

    Raises:
        ValueError: it has not.
    """
    wanted = requested(impl)
    if wanted != "auto" and not has_op(wanted, op):
        source = f"impl={wanted!r}" if wanted == impl else f"{ENVIRONMENT_VARIABLE}={wanted}"
        raise ValueError(f"{source} cannot be used: it has no {op}; use 'auto' or 'chunked'")


def flag(name: str, value: Any) -> bool:
    """Check an option that must be True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value
