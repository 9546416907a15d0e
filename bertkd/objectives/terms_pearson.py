"""Pearson correlation of attention maps: rows in chunks, or the released four-axis form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bertkd.errors import unknown_name
from bertkd.layer_maps import Pairs
from bertkd.objectives.attention_base import AttentionTerm
from bertkd.objectives.base import Memory, Setup, Shape, StepContext, register_term
from bertkd.windows import is_near, reach

ROWS = 64  # query rows per chunk: memory is B * H * ROWS * L instead of B * H * L * L
AXES = ("keys", "all")
EPS = 1e-8  # as released, in the quotients of axes="all"


@register_term
class AttPearson(AttentionTerm):
    """1 - mean Pearson correlation of attention maps along the keys, over pairs of blocks.

    Rows are computed ``ROWS`` at a time and again in the backward pass, so memory is linear in L.
    Only keys that are attended to correlate (real ones, in the blocks' window where they have one) and only real
    rows with two or more of them count. ``axes="all"``
    (``@released``) adds the correlations along queries, heads and batch, pads included, and builds
    all maps: memory is quadratic in L. Heads and batch of size 1 have no correlation there, and
    `EPS` in the quotients keeps tiny probabilities from having much.

    Source: the paper's released 'pear_col', which uses the last blocks.
    """

    kind: ClassVar[str] = "att_pearson"
    RESPLITS: ClassVar[bool] = False
    RELEASED: ClassVar[Mapping[str, Any]] = {"map": "last", "axes": "all", "count_pads": True}

    def __init__(self, setup: Setup, *, axes: str = "keys", **heads: Any) -> None:
        """Check heads and map.

        Raises:
            ValueError: head counts differ, relation heads asked for, or a map out of range.
        """
        super().__init__(setup, **heads)
        if axes not in AXES:
            raise unknown_name("axes", str(axes), AXES)
        self.axes = axes

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs of this step."""
        return self.over_windows(step, partial(self._compare, step))

    def _compare(self, step: StepContext, pairs: Pairs, window: int | None) -> Tensor:
        mask = None if step.mask is None else step.mask.bool()
        attended = _Attended(mask, window, self.count_pads)
        form = _along_keys if self.axes == "keys" else _along_all_axes
        return torch.stack([form(*_operands(step, s, t), attended) for s, t in pairs]).sum()

    def memory(self, shape: Shape) -> Memory:
        """Naive: all maps and two centred ones per pair; by rows: the teacher's q, k."""
        pairs = len(self.pairs)
        naive = self.naive_maps(shape) + pairs * 2 * self.one_map(shape)
        return Memory(naive, naive if self.axes == "all" else pairs * self.fused_rows(shape))


class _Attended(NamedTuple):
    """Which keys rows attend to, and which rows count."""

    mask: Tensor | None
    window: int | None
    count_pads: bool

    def keys(self, rows: slice, among: slice, device: torch.device) -> Tensor | None:
        """Those of ``among`` that every row attends to, broadcast to (B, H, rows, keys); None for all."""
        real = None if self.mask is None else self.mask[:, None, None, among]
        if self.window is None:
            return real
        near = is_near(self.window, rows, among, device)
        return near[None, None] if real is None else real & near

    def weight(self, rows: slice, keys: Tensor | None, length: int, like: Tensor) -> Tensor:
        """1 for rows that count, broadcast to (B, H, rows): those with two keys or more, which may correlate."""
        weight = like.new_ones(like.shape[0], 1, rows.stop - rows.start)
        if self.mask is not None and not self.count_pads:
            weight = weight * self.mask[:, None, rows]
        return weight * (length > 1 if keys is None else keys.sum(-1) > 1)


def _operands(step: StepContext, s: int, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ours, theirs = step.student, step.teacher
    # Scaling q is what the models do themselves: the scores are q k^T from here on.
    q_s, q_t = ours.q[s].float() * ours.scale[s], theirs.q[t].float() * theirs.scale[t]
    return q_s, ours.k[s].float(), q_t, theirs.k[t].float()


def pearson(x: Tensor, y: Tensor, dim: int, valid: Tensor | None) -> Tensor:
    """Pearson correlation along ``dim``, over entries where ``valid``; constant slices give 0."""
    if valid is None:
        x_c, y_c = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    else:
        count = valid.sum(dim, keepdim=True).clamp_min(1)
        x_c = (x - x.sum(dim, keepdim=True) / count) * valid
        y_c = (y - y.sum(dim, keepdim=True) / count) * valid
    # Relative to the slice's own size, far above float32's rounding and far below any real spread.
    tiny = torch.finfo(x.dtype).tiny
    norm_x = (x_c.square().sum(dim) + 1e-12 * x.square().sum(dim) + tiny).rsqrt()
    norm_y = (y_c.square().sum(dim) + 1e-12 * y.square().sum(dim) + tiny).rsqrt()
    return (x_c * y_c).sum(dim) * norm_x * norm_y


def _maps(q: Tensor, k: Tensor, keys: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    if keys is None:
        return torch.softmax(scores, -1)
    # A finite stand-in for minus infinity keeps rows without keys free of NaN.
    low = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~keys, low), -1).masked_fill(~keys, 0.0)


def _chunk(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None) -> Tensor:
    return pearson(_maps(q_s, k_s, keys), _maps(q_t, k_t, keys), -1, keys)


def _along_keys(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, attended: _Attended) -> Tensor:
    heads, length = q_s.shape[1:3]
    total, count = q_s.new_zeros(()), q_s.new_zeros(())
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        among = reach(attended.window, rows, length)
        keys = attended.keys(rows, among, q_s.device)
        correlation = checkpoint(
            _chunk,
            q_s[:, :, rows],
            k_s[:, :, among],
            q_t[:, :, rows],
            k_t[:, :, among],
            keys,
            use_reentrant=False,
        )
        weight = attended.weight(rows, keys, length, q_s)
        total = total + ((1.0 - correlation) * weight).sum()
        count = count + weight.sum()
    return total / (count * heads).clamp_min(1)


def _along_all_axes(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, attended: _Attended
) -> Tensor:
    everything = slice(0, q_s.shape[2])
    keys = attended.keys(everything, everything, q_s.device)
    ours, theirs = _maps(q_s, k_s, keys), _maps(q_t, k_t, keys)
    losses = [1.0 - _released_pearson(ours, theirs, dim).mean() for dim in (-1, -2, 1, 0)]
    return torch.stack(losses).sum()


def _released_pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Unlike `pearson` with an absolute guard: along queries, heads and batch whole slices are next to 0."""
    x_c, y_c = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(x_c, dim=dim) * torch.linalg.vector_norm(y_c, dim=dim)
    return (x_c * y_c).sum(dim) / (norms + EPS)
