"""Losses on what the attention compares: maps, relations, scores. No L x L tensor is built, except by impl="eager"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bertkd import reference
from bertkd.errors import unknown_name
from bertkd.functional.compared import (
    Blocks,
    Compared,
    Given,
    Names,
    compare,
    key_count,
    pair_count,
)
from bertkd.ops.autograd import row_loss, total_loss
from bertkd.ops.checks import (
    check_clamps,
    check_options,
)
from bertkd.ops.dispatch import requested


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
    window: int | None = None,
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
        window: how many tokens to either side a row of either side attends to, as in blocks with sliding-window
            attention (half of ModernBERT's ``local_attention``); all by default. The work is then O(L window).
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
        window=window,
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
    window: int | None = None,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    min_prob: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    **unknown: Any,
) -> Tensor:
    """``relation_kl``, with errors that use the caller's name ``op`` and its argument ``names``."""
    for name in unknown:
        known = relation_kl.__kwdefaults__ or ()
        raise TypeError(str(unknown_name(f"option of {op}", name, known)))
    check_options(op, reduction, temperature)
    check_clamps(op, min_prob=min_prob)
    compared = compare(
        op,
        names,
        given,
        mask,
        (scale_s, scale_t),
        relation_heads,
        window,
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
    elif compared.of_itself and compared.window is None:
        # A relation of one tensor with itself has symmetric scores, and one gradient.
        loss = _fused("self_relation_kl", impl, compared, divisor, reduction)
    else:
        loss = _fused("relation_kl", impl, compared, divisor, reduction)
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
    window: int | None = None,
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
        scale_s, scale_t, relation_heads, window: as in ``relation_kl``; with a window the mean is over the pairs
            inside it.
        row_weight, reduction, impl: see the module; ``"none"`` is every row's mean over its keys, for one block.
        count_pads: pad rows count, and the mean is over B H L^2 pairs (of a window, all in it), pad keys counted as 0.
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
    compared = compare(
        op,
        ("q_s", "k_s", "q_t", "k_t"),
        (q_s, k_s, q_t, k_t),
        mask,
        (scale_s, scale_t),
        relation_heads,
        window,
        row_weight=row_weight,
        count_pads=count_pads,
        reduction=reduction,
    )
    impl = requested(impl, None if min_score is None else "min_score")
    keys = key_count(compared, count_pads)
    divisor = None
    if reduction == "mean":
        divisor = pair_count(compared, keys, count_pads).clamp_min(1.0) * compared.heads
    if impl == "eager":
        rows = partial(reference.attention_mse_rows, min_score=min_score)
        loss = _by_definition(rows, compared, divisor, reduction)
    else:
        loss = _fused(op, impl, compared, divisor, reduction)
    return loss / keys.clamp_min(1.0)[:, None] if reduction == "none" else loss


def _by_definition(
    rows: Callable[..., Tensor], compared: Compared, divisor: Tensor | None, reduction: str
) -> Tensor:
    """The loss as the reference computes its rows, maps and all; the weighted rows for ``reduction="none"``."""
    _, _, mask, scale_s, scale_t, window, weight, _ = compared
    rows = partial(rows, mask=mask, scale_s=scale_s, scale_t=scale_t, window=window)
    every = [rows(*block) for block in compared.blocks]
    loss = weight * (every[0] if len(every) == 1 else torch.stack(every).sum(0))
    if reduction == "none":
        return loss
    return loss.sum() if divisor is None else loss.sum() / divisor


def _fused(
    op: str, impl: str, compared: Compared, divisor: Tensor | None, reduction: str
) -> Tensor:
    """The same by an op of ``ops.schema``, of which a window has its own."""
    blocks, _, mask, scale_s, scale_t, window, weight, _ = compared
    of_itself = op == "self_relation_kl"
    scalars: tuple[float, ...] = (scale_s, scale_t)
    if window is not None:
        op, scalars = f"window_{op}", (*scalars, window)
    calls = [(*block[:: 1 + of_itself], mask, *scalars) for block in blocks]
    wrt = range(2 - of_itself)
    if reduction == "none":
        return row_loss(op, impl, weight, calls[0], wrt)
    return total_loss(op, impl, weight, calls, wrt, divisor)
