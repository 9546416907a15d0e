"""relation_kl by FlexAttention, which has one softmax a call: what it can express, and at what price.

With P_t = softmax(T) and T = c_t a_t b_t^T, S = c_s a_s b_s^T, a row's KL is::

    sum_j P_t (T - S) - lse(T) + lse(S) = c_t a_t . (P_t b_t) - c_s a_s . (P_t b_s) - lse(T) + lse(S)

P_t [b_t, b_s] is attention of the teacher over both sides' keys as values, and lse(S) comes with an attention of the
student. Two calls, no map. The difference of large terms cancels, which costs digits in half precision. The squared
difference of scores (attention_mse) cannot be expressed at all: a call sees one score matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bertkd.bench.cases import Case
from bertkd.bench.spec import Inputs, Loss


def why_not(case: Case, device: torch.device, mode: str) -> str | None:
    """Why FlexAttention cannot run a case, or None if it can."""
    if device.type == "cpu":
        return "FlexAttention has no backward on CPUs, and does not return the log-sum-exp"
    return why_not_compiled(case, device, mode)


def why_not_compiled(case: Case, device: torch.device, mode: str) -> str | None:
    """Why a contestant that has to be compiled is left out of a case, or None."""
    if case.importance > 1:
        return "compiled for the most important cases only"
    # That would double the graphs, most of what a case costs on a GPU, where ten minutes have to be enough.
    if device.type == "cuda" and mode == "fwd":
        return "compiled with gradients only"
    return None


@cache
def _attention():
    from torch.nn.attention.flex_attention import flex_attention

    # As a full graph it fails after as many graphs as PyTorch keeps; else it would go on uncompiled, with every map.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def loss(window: int | None = None) -> Loss:
    """inputs -> summed KL; with a window over the keys that are at most so many tokens away."""
    from torch.nn.attention.flex_attention import AuxRequest

    def run(inputs: Inputs) -> Tensor:
        a_s, b_s, a_t, b_t = inputs.relation
        scale_s, scale_t = a_s.shape[-1] ** -0.5, a_t.shape[-1] ** -0.5
        attend = _attention()
        block_mask = _block_mask(inputs.mask, a_s, window)
        # Contiguous: the kernels are at their best with it, and the rows' products below need it anyway.
        a_s, b_s, a_t, b_t = (x.contiguous() for x in (a_s, b_s, a_t, b_t))
        values = torch.cat([b_t, b_s], -1)
        options = {"block_mask": block_mask, "return_aux": AuxRequest(lse=True)}
        mixed, of_teacher = attend(a_t, b_t, values, scale=scale_t, **options)
        _, of_student = attend(a_s, b_s, b_s, scale=scale_s, **options)
        of_t, of_s = mixed.float().split([b_t.shape[-1], b_s.shape[-1]], -1)
        cross = (a_t.float() * of_t).sum(-1) * scale_t - (a_s.float() * of_s).sum(-1) * scale_s
        rows = cross - of_teacher.lse.float() + of_student.lse.float()
        return rows.sum() if inputs.mask is None else (rows * inputs.mask[:, None, :]).sum()

    return run


def _block_mask(mask: Tensor | None, like: Tensor, window: int | None):
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    def real(batch, head, query, key):
        return mask[batch, key]

    def near(batch, head, query, key):
        return (query - key).abs() <= window

    wanted = [real] * (mask is not None) + [near] * (window is not None)
    if not wanted:
        return None
    batch, _, length, _ = like.shape
    batches = None if mask is None else batch
    return create_block_mask(and_masks(*wanted), batches, None, length, length, device=like.device)
