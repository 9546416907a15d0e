"""Windows of attention: a row attends to the keys that are at most so many tokens away, on either side."""

from __future__ import annotations

import torch
from torch import Tensor


def reach(window: int | None, rows: slice, length: int) -> slice:
    """The keys among the first ``length`` that any of the rows attends to; all of them without a window."""
    if window is None:
        return slice(0, length)
    return slice(max(0, rows.start - window), min(length, rows.stop + window))


def is_near(window: int, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """Which keys every row attends to, (rows, keys)."""
    row, key = (torch.arange(x.start, x.stop, device=device) for x in (rows, keys))
    return (row[:, None] - key).abs() <= window
