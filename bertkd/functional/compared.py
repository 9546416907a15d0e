"""What the losses on attention compare: checked blocks with their heads re-split, and which rows and pairs count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bertkd.ops.checks import (
    check_attention,
    check_number,
    check_tensors,
    check_window,
    regroup_heads,
)
from bertkd.ops.rows import as_mask, row_weights
from bertkd.reference import compute_dtype

Blocks = Tensor | Sequence[Tensor]
# a and b of the student, a and b of the teacher: in one block, as they are given, and by name.
Block = tuple[Tensor, Tensor, Tensor, Tensor]
Given = tuple[Blocks, Blocks, Blocks, Blocks]
Names = tuple[str, str, str, str]


class Compared(NamedTuple):
    """What an attention loss compares: checked blocks with their heads re-split, and the rows that count.

    Attributes:
        blocks: of equal shapes, the teacher cut off from the graph.
        of_itself: whether every relation is of one tensor with itself, on both sides.
        mask: boolean (B, L), or None.
        scale_s, scale_t: factors on the scores, the temperature's among them.
        window: how many tokens to either side are compared; None where that is all.
        weight: of the rows, (B, H, L).
        rows: how many of one head's count, a 0-d tensor.
    """

    blocks: list[Block]
    of_itself: bool
    mask: Tensor | None
    scale_s: float
    scale_t: float
    window: int | None
    weight: Tensor
    rows: Tensor

    @property
    def heads(self) -> int:
        return self.weight.shape[1]


def compare(
    op: str,
    names: Names,
    given: Given,
    mask: Tensor | None,
    scales: tuple[float | None, float | None],
    relation_heads: int | None,
    window: int | None,
    *,
    temperature: float = 1.0,
    row_weight: Tensor | None,
    count_pads: bool,
    reduction: str,
) -> Compared:
    """Check what both attention losses are given and bring it into the form that their implementations take."""
    for name, scale in zip(("scale_s", "scale_t"), scales, strict=True):
        if scale is not None:
            check_number(op, name, scale)
    whole = _blocks(op, names, given)
    if len(whole) > 1 and reduction == "none":
        raise ValueError(
            f"{op}: reduction='none' takes one block per call, got {len(whole)}. Call once per block."
        )
    of_itself = all(a_s is b_s and a_t is b_t for a_s, b_s, a_t, b_t in whole)
    blocks = [_heads(op, names, block, relation_heads) for block in whole]
    a_s, _, a_t, _ = blocks[0]
    batch, heads, length, _ = a_s.shape
    mask = as_mask(op, mask, a_s, (batch, length))
    if window is not None:
        window = check_window(op, window)
        # A window that holds every sequence takes nothing away.
        window = window if window < length - 1 else None
    scale_s, scale_t = (
        (x.shape[-1] ** -0.5 if scale is None else scale) / temperature
        for scale, x in zip(scales, (a_s, a_t), strict=True)
    )
    dtype = compute_dtype(*(x for block in blocks for x in block))
    counted = None if count_pads else mask
    weight, count = row_weights(
        op, (batch, length), counted, row_weight, dtype=dtype, device=a_s.device
    )
    weight = weight[:, None, :].expand(batch, heads, length)
    return Compared(blocks, of_itself, mask, scale_s, scale_t, window, weight, count)


def _blocks(op: str, names: Names, given: Given) -> list[Block]:
    """The four tensors of every block, checked."""
    counts = [len(x) if isinstance(x, (list, tuple)) else None for x in given]
    if counts == [None] * 4:
        single = cast(Block, given)
        check_tensors(op, 4, **dict(zip(names, single, strict=True)))
        return [single]
    if None in counts or 0 in counts or len(set(counts)) > 1:
        kinds = ["a tensor" if count is None else f"a sequence of {count}" for count in counts]
        found = dict(zip(names, kinds, strict=True))
        raise ValueError(
            f"{op}: {', '.join(found)} must all be tensors, or all sequences with a tensor for each block, got "
            f"{', '.join(f'{kind} for {name}' for name, kind in found.items())}."
        )
    blocks = [cast(Block, block) for block in zip(*given, strict=True)]
    for index, block in enumerate(blocks):
        check_tensors(
            op, 4, **{f"{name}[{index}]": x for name, x in zip(names, block, strict=True)}
        )
        for name, x, first in zip(names, block, blocks[0], strict=True):
            if x.shape != first.shape:
                raise ValueError(
                    f"{op}: blocks must have one shape, got {tuple(first.shape)} for {name}[0] and {tuple(x.shape)} "
                    f"for {name}[{index}]. Call once per shape."
                )
    return blocks


def _heads(op: str, names: Names, block: Block, relation_heads: int | None) -> Block:
    """A block with its heads re-split, if they are to be, and the teacher cut off from the graph."""
    a_s, b_s = (regroup_heads(op, "the student", x, relation_heads) for x in block[:2])
    a_t, b_t = (regroup_heads(op, "the teacher", x.detach(), relation_heads) for x in block[2:])
    check_attention(op, names, (a_s, b_s, a_t, b_t))
    return a_s, b_s, a_t, b_t


def key_count(compared: Compared, count_pads: bool) -> Tensor:
    """Keys that count for every row, (B, 1), or (B, L) where a window leaves every row others."""
    mask, weight, window = compared.mask, compared.weight, compared.window
    batch, _, length = weight.shape
    keys = weight.new_ones(batch, length)
    if mask is not None and not count_pads:
        keys = mask.to(weight.dtype)
    if window is None:
        return keys.sum(1, keepdim=True)
    # Sums up to every position: those of a window are the difference of two.
    before = torch.nn.functional.pad(keys.cumsum(1), (1, 0))
    at = torch.arange(length, device=weight.device)
    return before[:, (at + window + 1).clamp_max(length)] - before[:, (at - window).clamp_min(0)]


def pair_count(compared: Compared, keys: Tensor, count_pads: bool) -> Tensor:
    """Pairs of rows and keys that count in one head of every sequence together."""
    mask, length = compared.mask, compared.weight.shape[2]
    if mask is None or count_pads:
        return keys.expand(-1, length).sum()
    return (keys * mask.to(keys.dtype)).sum()
