"""How the work is cut: tiles of scores that stay in the cache, and the softmax sweep over one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.windows import is_near, reach

# Least rows of a tile of windows: its keys reach as far as its first and last row's do, so that of smaller tiles more
# would be computed twice, of larger ones more for nothing.
WINDOW_ROWS = 128
# Scores in flight. On CPUs two tiles of 2 MiB stay in the last-level cache; on GPUs large tiles hide launches.
CPU_BUDGET = 1 << 19
GPU_BUDGET = 1 << 24


def budget(device: torch.device) -> int:
    """Elements that one tile may have on ``device``."""
    return CPU_BUDGET if device.type == "cpu" else GPU_BUDGET


class Tile(NamedTuple):
    """A block of scores: sequences x heads x query rows x keys."""

    batch: slice
    heads: slice
    rows: slice
    keys: slice

    def rows_in(self, x: Tensor) -> Tensor:
        """The tile's query rows of (B, H, L, ...), a view."""
        return x[self.batch, self.heads, self.rows]

    def keys_in(self, x: Tensor) -> Tensor:
        """The tile's keys of (B, H, L, ...), a view."""
        return x[self.batch, self.heads, self.keys]


def _used(flags: Tensor) -> list[int]:
    """Per sequence, the number of positions up to and including the last one that is set: (B, L) -> B numbers."""
    positions = torch.arange(1, flags.shape[1] + 1, device=flags.device)
    return (flags.to(torch.int64) * positions).amax(1).tolist()


def tiles(
    like: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None = None,
    window: int | None = None,
) -> Iterator[Tile]:
    """Cut (B, H, L, L) scores into tiles; on a CPU pads at the end of a sequence are left out.

    Args:
        like: (B, H, L, D), for its shape and device.
        mask: (B, L) keys, or None.
        row_weight: (B, H, L); rows of weight 0 at the end of a sequence are left out. None keeps all rows.
        window: how many tokens to either side a row compares, so that the tiles lie along the diagonal; None for all.
    """
    batch, heads, length, _ = like.shape
    if length == 0:
        return
    keys = rows = [length] * batch
    # Reading the lengths costs a synchronisation on a GPU, so there every tile has all keys.
    if mask is not None and like.device.type == "cpu":
        keys = _used(mask)
        if row_weight is not None:
            rows = _used((row_weight != 0).any(1))
    limit = budget(like.device)
    most_rows = most_keys = length
    if window is not None:
        most_rows = min(length, max(WINDOW_ROWS, window))
        most_keys = min(length, most_rows + 2 * window)
    group = max(1, limit // max(1, heads * most_rows * most_keys))
    for b in range(0, batch, group):
        n_keys, n_rows = max(keys[b : b + group]), max(rows[b : b + group])
        if n_keys == 0 or n_rows == 0:
            continue
        in_tile = min(n_keys, most_keys)
        step_rows = max(1, min(n_rows, most_rows, limit // in_tile))
        step_heads = max(1, min(heads, limit // (step_rows * in_tile)))
        for h in range(0, heads, step_heads):
            for r in range(0, n_rows, step_rows):
                rows_of_tile = slice(r, min(r + step_rows, n_rows))
                keys_of_tile = reach(window, rows_of_tile, n_keys)
                if keys_of_tile.start < keys_of_tile.stop:
                    yield Tile(
                        slice(b, min(b + group, batch)),
                        slice(h, min(h + step_heads, heads)),
                        rows_of_tile,
                        keys_of_tile,
                    )


class Workspace:
    """Reusable buffers: a fresh allocation per tile would page-fault its way through memory."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self.dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def rows_of(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """The tile's query rows of (B, H, L, ...) as (G, rows, ...) in the dtype of the sums."""
    return tile.rows_in(x).to(dtype).flatten(0, 1)


def keys_of(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """The tile's keys of (B, H, L, D) as (G, keys, D) in the dtype of the sums."""
    return tile.keys_in(x).to(dtype).flatten(0, 1)


def score_tile(a: Tensor, b: Tensor, scale: float, work: Workspace, name: str) -> Tensor:
    """``a @ b^T * scale`` of (G, rows, D) and (G, keys, D) into the buffer ``name``."""
    out = work.get(name, a.shape[0], a.shape[1], b.shape[1])
    return torch.baddbmm(out, a, b.transpose(1, 2), beta=0, alpha=scale, out=out)


def left_out(mask: Tensor | None, tile: Tile, window: int | None, like: Tensor) -> Tensor | None:
    """Which of the tile's pairs take no part, broadcast to (G, rows, keys): pad keys, and those outside the window.

    None if there are none: of pads this is known on a CPU only.
    """
    beyond = None if window is None else ~is_near(window, tile.rows, tile.keys, like.device)
    if mask is None:
        return beyond
    pad = ~mask[tile.batch, tile.keys].bool()
    if pad.device.type == "cpu" and not bool(pad.any()):
        return beyond
    heads = tile.heads.stop - tile.heads.start
    pad = pad[:, None, None, :].expand(-1, heads, -1, -1).flatten(0, 1)
    return pad if beyond is None else pad | beyond


def kl_sweep(s: Tensor, t: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Row KL of two tiles of scores, and P_s - P_t, without another buffer.

    KL = sum_j P_t (T_j - S_j - lse_t + lse_s). The difference of the log-sum-exps comes from the row
    maxima (lse = max S - log max P), the maxima's difference first, and is taken off before the sum:
    a common shift of scores costs no accuracy.

    Args:
        s: student scores (..., rows, n); overwritten.
        t: teacher scores, same shape; overwritten.
        p: scratch of the same shape.

    Returns:
        Row KL (..., rows) and P_s - P_t (..., rows, n).
    """
    max_s, max_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    p_t = torch.softmax(t, -1, out=p)
    difference = t.sub_(s)
    # The CPU kernel reads an element before it writes it; others do not promise that.
    p_s = torch.softmax(s, -1, out=s) if s.device.type == "cpu" else torch.softmax(s, -1)
    ratio = p_t.amax(-1, keepdim=True).log() - p_s.amax(-1, keepdim=True).log()
    rows = difference.sub_((max_t - max_s) - ratio).mul_(p_t).sum(-1)
    return rows, p_s.sub_(p_t)


def low(dtype: torch.dtype) -> float:
    """A finite stand-in for minus infinity: adding or subtracting two of them makes no NaN."""
    return torch.finfo(dtype).min / 4
