"""relation_kl: tiles of both sides' scores, one softmax sweep, loss and both gradients in one visit."""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.chunked.tiles import (
    Tile,
    Workspace,
    key_mask,
    keys_of,
    kl_sweep,
    low,
    rows_of,
    score_tile,
    tiles,
)
from bertkd.reference import compute_dtype


class _Relations:
    """The two score tiles of a tile, masked, and their sweep."""

    def __init__(self, a_s, b_s, a_t, b_t, mask, scale_s, scale_t) -> None:
        self.student, self.teacher = (a_s, b_s, scale_s), (a_t, b_t, scale_t)
        self.mask = mask
        self.dtype = compute_dtype(a_s, b_s, a_t, b_t)
        self.work = Workspace(self.dtype, a_s.device)

    def sweep(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row KL (G, rows), P_s - P_t (G, rows, keys), and the student's rows and keys of the tile."""
        pads = key_mask(self.mask, tile)
        tile_scores = []
        for name, (a, b, scale) in (("t", self.teacher), ("s", self.student)):
            a_tile, b_tile = rows_of(a, tile, self.dtype), keys_of(b, tile, self.dtype)
            scores = score_tile(a_tile, b_tile, scale, self.work, name)
            if pads is not None:
                scores.masked_fill_(pads, low(self.dtype))
            tile_scores.append(scores)
        t, s = tile_scores
        rows, difference = kl_sweep(s, t, self.work.get("p", *s.shape))
        return rows, difference, a_tile, b_tile


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
    relations = _Relations(a_s, b_s, a_t, b_t, mask, scale_s, scale_t)
    out = torch.zeros(a_s.shape[:-1], dtype=relations.dtype, device=a_s.device)
    for tile in tiles(a_s, mask):
        rows, *_ = relations.sweep(tile)
        out[tile.batch, tile.heads, tile.rows] = rows.view(
            -1, tile.heads.stop - tile.heads.start, rows.shape[-1]
        )
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
    relations = _Relations(a_s, b_s, a_t, b_t, mask, scale_s, scale_t)
    dtype = relations.dtype
    loss = torch.zeros((), dtype=dtype, device=a_s.device)
    # Preserves the strides of the input: a (B, L, H, D) view gets its gradient without a transposition.
    grad_a = torch.zeros_like(a_s)
    grad_b = torch.zeros_like(b_s, dtype=dtype)
    for tile in tiles(a_s, mask, row_weight):
        rows, difference, a, b = relations.sweep(tile)
        # Weights go on the narrow (rows, D) factors, not on the (rows, keys) tile.
        weight = row_weight[tile.batch, tile.heads, tile.rows].to(dtype).flatten(0, 1)
        loss += torch.dot(rows.flatten(), weight.flatten())
        weight = weight.unsqueeze(-1)
        at_rows = grad_a[tile.batch, tile.heads, tile.rows]
        grad = torch.bmm(difference, b).mul_(weight * scale_s)
        at_rows.copy_(grad.view(at_rows.shape))
        at_keys = grad_b[tile.batch, tile.heads, : tile.keys]
        grad = torch.bmm(difference.transpose(1, 2), a * (weight * scale_s))
        at_keys.add_(grad.view(at_keys.shape))
    return loss, grad_a, grad_b.to(b_s.dtype)
