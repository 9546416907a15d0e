"""Not written yet."""

from __future__ import annotations


def unavailable() -> str | None:
    """Why nothing here can run."""
    return "this version has no such kernels yet"
