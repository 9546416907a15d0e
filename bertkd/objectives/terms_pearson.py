"""Pearson correlation of attention maps: rows in chunks, or the released four-axis form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bertkd.errors import unknown_name
from bertkd.objectives.attention_base import AttentionTerm
from bertkd.objectives.base import Memory, Setup, Shape, StepContext, register_term

ROWS = 64  # query rows per chunk: memory is B * H * ROWS * L instead of B * H * L * L
AXES = ("keys", "all")
EPS = 1e-8  # as released, in the quotients of axes="all"


@register_term
class AttPearson(AttentionTerm):
    """1 - mean Pearson correlation of attention maps along the keys, over pairs of blocks.

    Rows are computed ``ROWS`` at a time and again in the backward pass, so memory is linear in L.
    Only real keys correlate and only real rows with two or more of them count. ``axes="all"``
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
        self.warn_of_windows(step)
        form = _along_keys if self.axes == "keys" else _along_all_axes
        return self.over_pairs(form(*self._operands(step, s, t)) for s, t in self.pairs)

    def _operands(self, step: StepContext, s: int, t: int) -> tuple[Any, ...]:
        ours, theirs = step.student, step.teacher
        # Scaling q is what the models do themselves: the scores are q k^T from here on.
        q_s, q_t = ours.q[s].float() * ours.scale[s], theirs.q[t].float() * theirs.scale[t]
        keys = step.mask.bool()[:, None, None, :] if step.mask is not None else None
        return q_s, ours.k[s].float(), q_t, theirs.k[t].float(), keys, self.count_pads

    def memory(self, shape: Shape) -> Memory:
        """Naive: all maps and two centred ones per pair; by rows: the teacher's q, k."""
        pairs = len(self.pairs)
        naive = self.naive_maps(shape) + pairs * 2 * self.one_map(shape)
        return Memory(naive, naive if self.axes == "all" else pairs * self.fused_rows(shape))


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


def _along_keys(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None, count_pads: bool
) -> Tensor:
    batch, _, length, _ = q_s.shape
    rows = torch.ones(batch, 1, length, device=q_s.device)
    if keys is not None:
        enough = keys.sum(-1) > 1
        rows = rows * enough if count_pads else keys[:, :, 0] * enough.float()
    elif length < 2:
        rows = rows * 0.0
    total = q_s.new_zeros(())
    for start in range(0, length, ROWS):
        part = slice(start, start + ROWS)
        correlation = checkpoint(
            _chunk, q_s[:, :, part], k_s, q_t[:, :, part], k_t, keys, use_reentrant=False
        )
        total = total + ((1.0 - correlation) * rows[:, :, part]).sum()
    return total / (rows.sum() * q_s.shape[1]).clamp_min(1)


def _along_all_axes(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None, count_pads: bool
) -> Tensor:
    ours, theirs = _maps(q_s, k_s, keys), _maps(q_t, k_t, keys)
    losses = [1.0 - _released_pearson(ours, theirs, dim).mean() for dim in (-1, -2, 1, 0)]
    return torch.stack(losses).sum()


def _released_pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Unlike `pearson` with an absolute guard: along queries, heads and batch whole slices are next to 0."""
    x_c, y_c = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(x_c, dim=dim) * torch.linalg.vector_norm(y_c, dim=dim)
    return (x_c * y_c).sum(dim) / (norms + EPS)
