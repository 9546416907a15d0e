"""relation_kl: tiles of both sides' scores, one softmax sweep, loss and both gradients in one visit."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.chunked.tiles import (
    Tile,
    Workspace,
    keys_of,
    kl_sweep,
    left_out,
    low,
    rows_of,
    score_tile,
    tiles,
)
from bertkd.reference import compute_dtype


class _Relations:
    """The two score tiles of a tile, masked, and their sweep."""

    def __init__(self, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window) -> None:
        self.student, self.teacher = (a_s, b_s, scale_s), (a_t, b_t, scale_t)
        self.mask, self.window = mask, window
        self.dtype = compute_dtype(a_s, b_s, a_t, b_t)
        self.work = Workspace(self.dtype, a_s.device)

    def sweep(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row KL (G, rows), P_s - P_t (G, rows, keys), and the student's rows and keys of the tile."""
        hidden = left_out(self.mask, tile, self.window, self.student[0])
        tile_scores = []
        for name, (a, b, scale) in (("t", self.teacher), ("s", self.student)):
            a_tile, b_tile = rows_of(a, tile, self.dtype), keys_of(b, tile, self.dtype)
            scores = score_tile(a_tile, b_tile, scale, self.work, name)
            if hidden is not None:
                scores.masked_fill_(hidden, low(self.dtype))
            tile_scores.append(scores)
        t, s = tile_scores
        rows, difference = kl_sweep(s, t, self.work.get("p", *s.shape))
        return rows, difference, a_tile, b_tile

    def gradients(self, tile: Tile, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tile's weighted KL, and its share of da (G, rows, D) and of db (G, keys, D)."""
        rows, difference, a, b = self.sweep(tile)
        # Weights go on the narrow (rows, D) factors, not on the (rows, keys) tile.
        weight = rows_of(row_weight, tile, self.dtype)
        value = torch.dot(rows.flatten(), weight.flatten())
        weight = weight.unsqueeze(-1) * self.student[2]
        return (
            value,
            torch.bmm(difference, b).mul_(weight),
            torch.bmm(difference.transpose(1, 2), a * weight),
        )


def relation_kl_rows(
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """KL of every query row, (B, H, L); rows of sequences without a real token are 0."""
    return _rows(a_s, b_s, a_t, b_t, mask, scale_s, scale_t)


def _rows(a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window=None) -> Tensor:
    relations = _Relations(a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window)
    out = torch.zeros(a_s.shape[:-1], dtype=relations.dtype, device=a_s.device)
    for tile in tiles(a_s, mask, window=window):
        rows, *_ = relations.sweep(tile)
        at_tile = tile.rows_in(out)
        at_tile.copy_(rows.view_as(at_tile))
    return out


def relation_kl_fwd_bwd(
    row_weight: Tensor,
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients: dS = w (P_s - P_t), da = dS b c, db = dS^T a c."""
    return _fwd_bwd(row_weight, a_s, b_s, a_t, b_t, mask, scale_s, scale_t)


def _fwd_bwd(
    row_weight, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window=None
) -> tuple[Tensor, Tensor, Tensor]:
    relations = _Relations(a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window)
    loss = torch.zeros((), dtype=relations.dtype, device=a_s.device)
    # Preserves the strides of the input: a (B, L, H, D) view gets its gradient without a transposition.
    grad_a = torch.zeros_like(a_s)
    grad_b = torch.zeros_like(b_s, dtype=relations.dtype)
    for tile in tiles(a_s, mask, row_weight, window):
        value, da, db = relations.gradients(tile, row_weight)
        loss += value
        at_rows, at_keys = tile.rows_in(grad_a), tile.keys_in(grad_b)
        at_rows.copy_(da.view_as(at_rows))
        at_keys.add_(db.view_as(at_keys))
    return loss, grad_a, grad_b.to(b_s.dtype)


def self_relation_kl_rows(
    x_s: Tensor, x_t: Tensor, mask: Tensor | None, scale_s: float, scale_t: float
) -> Tensor:
    """``relation_kl_rows`` of x with itself."""
    return relation_kl_rows(x_s, x_s, x_t, x_t, mask, scale_s, scale_t)


def self_relation_kl_fwd_bwd(
    row_weight: Tensor,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor]:
    """``relation_kl_fwd_bwd`` of x with itself: one gradient, the sum of both roles, rounded once."""
    relations = _Relations(x_s, x_s, x_t, x_t, mask, scale_s, scale_t, None)
    loss = torch.zeros((), dtype=relations.dtype, device=x_s.device)
    grad = torch.zeros_like(x_s, dtype=relations.dtype)
    for tile in tiles(x_s, mask, row_weight):
        value, da, db = relations.gradients(tile, row_weight)
        loss += value
        at_rows, at_keys = tile.rows_in(grad), tile.keys_in(grad)
        at_rows.add_(da.view_as(at_rows))
        at_keys.add_(db.view_as(at_keys))
    return loss, grad.to(x_s.dtype)


def window_relation_kl_rows(
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> Tensor:
    """``relation_kl_rows`` over the keys that are at most ``window`` tokens away, O(L window)."""
    return _rows(a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window)


def window_relation_kl_fwd_bwd(
    row_weight: Tensor,
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``relation_kl_fwd_bwd`` over the keys that are at most ``window`` tokens away."""
    return _fwd_bwd(row_weight, a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window)
