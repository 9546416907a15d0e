"""self_attention, to all tokens and to windows, as the benchmark sees it: no loss, but what networks spend time on."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bertkd.bench.cases import Case
from bertkd.bench.ops_attention import (
    WINDOW,
    attended,
    pairs_of,
    part,
    part_of,
    scores,
    tokens_of,
    window_option,
)
from bertkd.bench.spec import Inputs, Loss, Spec, Work, item_bytes, make_mask, random_tensor
from bertkd.ops.self_attention import self_attention


def _make(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Queries, keys and values with gradients, and fixed weights of the outputs, all as in a model."""
    shape = (case.batch, case.length, case.heads, case.width_s)
    q, k, v, weight = (
        random_tensor(shape, case, device, generator).transpose(1, 2) for _ in range(4)
    )
    return Inputs([q, k, v], [weight], make_mask(case, device))


def _sum(out: Tensor, inputs: Inputs) -> Tensor:
    rows = out * inputs.teacher[0]
    return (rows if inputs.mask is None else rows * inputs.mask[:, None, :, None]).sum()


def _eager(window: int | None, inputs: Inputs) -> Tensor:
    q, k, v = inputs.student
    return _sum(torch.softmax(scores(q, k, inputs.mask, window), -1) @ v, inputs)


def sdpa(window: int | None = None) -> Loss:
    """PyTorch's scaled dot product attention, with the mask that transformers makes for it."""

    def loss(inputs: Inputs) -> Tensor:
        q, k, v = inputs.student
        keys = attended(inputs.mask, window, q)
        mask = None if keys is None else keys.expand(len(q), -1, q.shape[2], -1)
        return _sum(F.scaled_dot_product_attention(q, k, v, mask), inputs)

    return loss


def _call(window: int | None, inputs: Inputs, impl: str) -> Tensor:
    if impl == "eager":
        return _eager(window, inputs)
    q, k, v = inputs.student
    return _sum(self_attention(q, k, v, inputs.mask, **window_option(window)), inputs)


def _work(case: Case, gradient: bool) -> Work:
    """Two products forward and four backward over one exponential a pair; each tensor moved once."""
    flops = 4 * pairs_of(case) * case.width_s * (3 if gradient else 1)
    moved = tokens_of(case) * case.width_s * item_bytes(case) * (8 if gradient else 4)
    return Work(moved, flops, pairs_of(case))


SPECS = {
    op: Spec(
        op=op,
        make=_make,
        call=partial(_call, window),
        eager=partial(_eager, window),
        part=part,
        part_of=part_of,
        work=_work,
        impls=("native",),
    )
    for op, window in (("self_attention", None), ("window_self_attention", WINDOW))
}
