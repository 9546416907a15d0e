"""Losses on what the attention compares: maps, relations, scores. No L x L tensor is built, except by impl="eager"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bertkd import reference
from bertkd.ops.autograd import row_loss, total_loss
from bertkd.ops.checks import (
    check_attention,
    check_clamps,
    check_number,
    check_options,
    check_tensors,
    regroup_heads,
)
from bertkd.ops.dispatch import requested
from bertkd.ops.rows import as_mask, row_weights

Blocks = Tensor | Sequence[Tensor]
# a and b of the student, a and b of the teacher: in one block, as they are given, and by name.
Block = tuple[Tensor, Tensor, Tensor, Tensor]
Given = tuple[Blocks, Blocks, Blocks, Blocks]
Names = tuple[str, str, str, str]


def relation_kl(
    a_s: Blocks,
    b_s: Blocks,
    a_t: Blocks,
    b_t: Blocks,
    mask: Tensor | None = None,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    relation_heads: int | None = None,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    min_prob: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """KL divergence between the relations of teacher and student, row by row.

    Equivalent, without masks, to::

        p_t = softmax(a_t @ b_t.mT * scale_t / temperature, -1)
        log_p_s = log_softmax(a_s @ b_s.mT * scale_s / temperature, -1)
        kl_div(log_p_s, p_t, reduction="none").sum(-1).mean()

    For several blocks to the sum over them, which costs less than as many calls: masks and weights are looked at
    once.

    Args:
        a_s, b_s: student (B, H, L, D_s), e.g. queries and keys, or a sequence of such tensors, one a block; strided
            views are welcome.
        a_t, b_t: teacher (B, H, L, D_t), or as many.
        mask: (B, L), 1 = real token.
        scale_s, scale_t: factors on the scores; 1/sqrt(D) of the (re-split) heads by default.
        temperature: divides both sides' scores.
        t_squared: multiply the loss by ``temperature ** 2``.
        relation_heads: concatenate the heads and re-split them into this many on either side; makes
            H_s != H_t work.
        row_weight, count_pads, reduction, impl: see the module; ``"none"`` is for one block.
        min_prob: the released code's clamp of the student's probabilities (1e-7); eager only.

    Returns:
        A 0-d tensor; (B, H, L) for ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: Wang et al., "How to Distill your BERT" (ACL 2023); relations and relation heads: MiniLM and
    MiniLMv2 (Wang et al., 2020 and 2021).
    """
    return _relation_kl(
        "relation_kl",
        ("a_s", "b_s", "a_t", "b_t"),
        (a_s, b_s, a_t, b_t),
        mask,
        scale_s=scale_s,
        scale_t=scale_t,
        temperature=temperature,
        t_squared=t_squared,
        relation_heads=relation_heads,
        row_weight=row_weight,
        count_pads=count_pads,
        min_prob=min_prob,
        reduction=reduction,
        impl=impl,
    )


def attention_kl(
    q_s: Blocks, k_s: Blocks, q_t: Blocks, k_t: Blocks, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """KL divergence between attention maps, KL(teacher || student), mean over rows and heads ("Att-KL").

    ``relation_kl`` of queries and keys; see there for shapes and options. The maps are the ones before
    dropout. Source: Wang et al., ACL 2023; MiniLM (Wang et al., 2020), equation 4.
    """
    names = ("q_s", "k_s", "q_t", "k_t")
    return _relation_kl("attention_kl", names, (q_s, k_s, q_t, k_t), mask, **options)


def value_relation_kl(
    v_s: Blocks, v_t: Blocks, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """KL divergence between value relations softmax(V V^T / sqrt(D)) ("Val-KL").

    ``relation_kl`` of the values with themselves, (B, H, L, D_s) and (B, H, L, D_t); see there for
    options. Source: MiniLM (Wang et al., 2020), equation 6.
    """
    names = ("v_s", "v_s", "v_t", "v_t")
    return _relation_kl("value_relation_kl", names, (v_s, v_s, v_t, v_t), mask, **options)


def _relation_kl(
    op: str,
    names: Names,
    given: Given,
    mask: Tensor | None = None,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    relation_heads: int | None = None,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    min_prob: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """``relation_kl``, with errors that use the caller's name ``op`` and its argument ``names``."""
    check_options(op, reduction, temperature)
    check_clamps(op, min_prob=min_prob)
    compared = _compare(
        op,
        names,
        given,
        mask,
        (scale_s, scale_t),
        relation_heads,
        temperature=temperature,
        row_weight=row_weight,
        count_pads=count_pads,
        reduction=reduction,
    )
    impl = requested(impl, None if min_prob is None else "min_prob")
    divisor = compared.rows * compared.heads if reduction == "mean" else None
    if impl == "eager":
        rows = partial(reference.relation_kl_rows, min_prob=min_prob)
        loss = _by_definition(rows, compared, divisor, reduction)
    else:
        # A relation of one tensor with itself has symmetric scores, and one gradient.
        name = "self_relation_kl" if compared.of_itself else "relation_kl"
        loss = _fused(name, impl, compared, divisor, reduction)
    return loss * temperature**2 if t_squared else loss


def attention_mse(
    q_s: Blocks,
    k_s: Blocks,
    q_t: Blocks,
    k_t: Blocks,
    mask: Tensor | None = None,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    relation_heads: int | None = None,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    min_score: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Mean squared difference of scaled attention scores over real (row, key) pairs ("Att-MSE").

    Equivalent, without masks, to ``mse_loss(q_s @ k_s.mT * scale_s, q_t @ k_t.mT * scale_t)``; for several blocks to
    the sum over them.

    Args:
        q_s, k_s: student (B, H, L, D_s), or a sequence of such tensors, one a block.
        q_t, k_t: teacher (B, H, L, D_t), or as many.
        mask: (B, L), 1 = real token.
        scale_s, scale_t, relation_heads: as in ``relation_kl``.
        row_weight, reduction, impl: see the module; ``"none"`` is every row's mean over its keys, for one block.
        count_pads: pad rows count, and the mean is over B H L^2 pairs, pad keys counted as 0.
        min_score: scores at or below it count as 0 (the released code's -1e2); eager only.

    Returns:
        A 0-d tensor; (B, H, L) for ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: Wang et al., ACL 2023; TinyBERT (Jiao et al., 2020), equation 7.
    """
    op = "attention_mse"
    check_options(op, reduction)
    check_clamps(op, min_score=min_score)
    compared = _compare(
        op,
        ("q_s", "k_s", "q_t", "k_t"),
        (q_s, k_s, q_t, k_t),
        mask,
        (scale_s, scale_t),
        relation_heads,
        row_weight=row_weight,
        count_pads=count_pads,
        reduction=reduction,
    )
    impl = requested(impl, None if min_score is None else "min_score")
    keys = _key_count(compared, count_pads)
    divisor = None
    if reduction == "mean":
        counted = compared.mask is not None and not count_pads
        pairs = keys * (keys if counted else float(compared.weight.shape[2]))
        divisor = pairs.sum().clamp_min(1.0) * compared.heads
    if impl == "eager":
        rows = partial(reference.attention_mse_rows, min_score=min_score)
        loss = _by_definition(rows, compared, divisor, reduction)
    else:
        loss = _fused(op, impl, compared, divisor, reduction)
    return loss / keys.clamp_min(1.0)[:, None, None] if reduction == "none" else loss


class _Compared(NamedTuple):
    """What an attention loss compares: checked blocks with their heads re-split, and the rows that count.

    Attributes:
        blocks: of equal shapes, the teacher cut off from the graph.
        of_itself: whether every relation is of one tensor with itself, on both sides.
        mask: boolean (B, L), or None.
        scale_s, scale_t: factors on the scores, the temperature's among them.
        weight: of the rows, (B, H, L).
        rows: how many of one head's count, a 0-d tensor.
    """

    blocks: list[Block]
    of_itself: bool
    mask: Tensor | None
    scale_s: float
    scale_t: float
    weight: Tensor
    rows: Tensor

    @property
    def heads(self) -> int:
        return self.weight.shape[1]


def _compare(
    op: str,
    names: Names,
    given: Given,
    mask: Tensor | None,
    scales: tuple[float | None, float | None],
    relation_heads: int | None,
    *,
    temperature: float = 1.0,
    row_weight: Tensor | None,
    count_pads: bool,
    reduction: str,
) -> _Compared:
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
    scale_s, scale_t = (
        (x.shape[-1] ** -0.5 if scale is None else scale) / temperature
        for scale, x in zip(scales, (a_s, a_t), strict=True)
    )
    dtype = reference.compute_dtype(*(x for block in blocks for x in block))
    counted = None if count_pads else mask
    weight, count = row_weights(
        op, (batch, length), counted, row_weight, dtype=dtype, device=a_s.device
    )
    weight = weight[:, None, :].expand(batch, heads, length)
    return _Compared(blocks, of_itself, mask, scale_s, scale_t, weight, count)


def _by_definition(
    rows: Callable[..., Tensor], compared: _Compared, divisor: Tensor | None, reduction: str
) -> Tensor:
    """The loss as the reference computes its rows, maps and all; the weighted rows for ``reduction="none"``."""
    _, _, mask, scale_s, scale_t, weight, _ = compared
    every = [rows(*block, mask, scale_s=scale_s, scale_t=scale_t) for block in compared.blocks]
    loss = weight * (every[0] if len(every) == 1 else torch.stack(every).sum(0))
    if reduction == "none":
        return loss
    return loss.sum() if divisor is None else loss.sum() / divisor


def _fused(
    op: str, impl: str, compared: _Compared, divisor: Tensor | None, reduction: str
) -> Tensor:
    """The same by an op of ``ops.schema``."""
    blocks, _, mask, scale_s, scale_t, weight, _ = compared
    of_itself = op == "self_relation_kl"
    calls = [(*block[:: 1 + of_itself], mask, scale_s, scale_t) for block in blocks]
    wrt = range(2 - of_itself)
    if reduction == "none":
        return row_loss(op, impl, weight, calls[0], wrt)
    return total_loss(op, impl, weight, calls, wrt, divisor)


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


def _key_count(compared: _Compared, count_pads: bool) -> Tensor:
    """Keys that count for every sequence, (B,)."""
    mask, weight = compared.mask, compared.weight
    if mask is None or count_pads:
        return weight.new_full((weight.shape[0],), float(weight.shape[2]))
    return mask.sum(1).to(weight.dtype)
