"""relation_kl, self_relation_kl and attention_mse as the benchmark sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertkd import functional
from bertkd.bench.cases import Case
from bertkd.bench.lengths import glue_lengths
from bertkd.bench.spec import Inputs, Spec, Work, item_bytes, make_mask, random_tensor


def _make(tensors_a_side: int):
    def make(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
        """(B, L, H, D) seen as (B, H, L, D), as it comes out of a model."""
        sides = [
            [
                random_tensor(
                    (case.batch, case.length, case.heads, width), case, device, generator
                ).transpose(1, 2)
                for _ in range(tensors_a_side)
            ]
            for width in (case.width_s, case.width_t)
        ]
        return Inputs(sides[0], sides[1], make_mask(case, device))

    return make


def scores(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled scores (B, H, L, L) in the inputs' dtype, pad keys at a large negative value."""
    s = a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5
    return s if mask is None else s.masked_fill(~mask[:, None, None, :], torch.finfo(s.dtype).min)


def kl_of_maps(p_s: Tensor, p_t: Tensor, mask: Tensor | None) -> Tensor:
    """KL(p_t || p_s) of maps, summed over real rows, as the paper's code writes it: clamp, log, kl_div."""
    log_p_s = p_s.float().clamp(1e-7, 1.0).log()
    rows = torch.nn.functional.kl_div(log_p_s, p_t.float(), reduction="none").sum(-1)
    return rows.sum() if mask is None else (rows * mask[:, None, :]).sum()


def _maps(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    # Softmax in float32 and back to the inputs' dtype is what Hugging Face's eager attention does.
    return torch.softmax(scores(a, b, mask), -1, dtype=torch.float32).to(a.dtype)


def _eager_relation_kl(inputs: Inputs) -> Tensor:
    a_s, b_s, a_t, b_t = inputs.relation
    return kl_of_maps(_maps(a_s, b_s, inputs.mask), _maps(a_t, b_t, inputs.mask), inputs.mask)


def _eager_attention_mse(inputs: Inputs) -> Tensor:
    a_s, b_s, a_t, b_t = inputs.relation
    # Pad pairs count as nothing; their scores may be anything finite.
    difference = (scores(a_s, b_s, None) - scores(a_t, b_t, None)).float().square()
    if inputs.mask is not None:
        pairs = inputs.mask[:, None, :, None] & inputs.mask[:, None, None, :]
        difference = difference.masked_fill(~pairs, 0.0)
    return difference.sum()


def _call(op: str):
    def call(inputs: Inputs, impl: str) -> Tensor:
        options: dict[str, Any] = {"reduction": "sum", "impl": impl}
        if op == "self_relation_kl":
            return functional.value_relation_kl(
                inputs.student[0], inputs.teacher[0], inputs.mask, **options
            )
        loss = functional.relation_kl if op == "relation_kl" else functional.attention_mse
        return loss(*inputs.relation, inputs.mask, **options)

    return call


def _chosen(inputs: Inputs) -> list[int]:
    """First, last and shortest sequence: where a loop's ends and a mask's skipped tiles may go wrong."""
    batch = inputs.student[0].shape[0]
    shortest = 0 if inputs.mask is None else int(inputs.mask.sum(1).argmin())
    return sorted({0, shortest, batch - 1})


def part(inputs: Inputs) -> Inputs:
    """First two heads of the chosen sequences."""
    chosen = _chosen(inputs)
    student, teacher = ([x[chosen, :2] for x in side] for side in (inputs.student, inputs.teacher))
    return Inputs(student, teacher, None if inputs.mask is None else inputs.mask[chosen])


def part_of(inputs: Inputs, grads: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the same heads and sequences."""
    chosen = _chosen(inputs)
    return [grad[chosen, :2] for grad in grads]


def _bare(inputs: Inputs) -> object:
    """The four products of relation_kl and its gradient by themselves: two scores, two gradients."""
    a_s, b_s, a_t, b_t = (x.detach() for x in inputs.relation)
    student, teacher = a_s @ b_s.transpose(-1, -2), a_t @ b_t.transpose(-1, -2)
    return teacher, student @ b_s, student.transpose(-1, -2) @ a_s


def pairs_of(case: Case) -> float:
    """Pairs of a real row and a real key."""
    if case.padding == "full":
        return float(case.batch * case.heads * case.length**2)
    return float(case.heads * sum(n * n for n in glue_lengths(case.batch, case.length)))


def tokens_of(case: Case) -> float:
    """Rows that count, of all heads."""
    if case.padding == "full":
        return float(case.batch * case.heads * case.length)
    return float(case.heads * sum(glue_lengths(case.batch, case.length)))


def _work(op: str):
    def work(case: Case, gradient: bool) -> Work:
        """Each tensor read once and each gradient written once; each score and exponential made once."""
        tokens = tokens_of(case)
        sides = 1 if op == "self_relation_kl" else 2
        widths = case.width_s * (2 if gradient else 1) + case.width_t
        moved = tokens * widths * sides * item_bytes(case)
        if op == "attention_mse":
            return _work_of_mse(case, gradient, tokens, moved)
        pairs = pairs_of(case)
        # Scores of a tensor with itself are symmetric: half of them suffice, and one product gives the gradient.
        share = 0.5 if sides == 1 else 1.0
        flops = 2 * pairs * (case.width_s + case.width_t) * share
        flops += 2 * pairs * case.width_s * sides if gradient else 0
        return Work(moved, flops, 2 * pairs * share)

    return work


def _work_of_mse(case: Case, gradient: bool, tokens: float, moved: float) -> Work:
    """Two Gram matrices (symmetric: half of each) instead of scores where that is less."""
    width = case.width_s + case.width_t
    gram = 2 * tokens * width * width + (4 * tokens * width * case.width_s if gradient else 0)
    tiles = 2 * pairs_of(case) * (width + (2 * case.width_s if gradient else 0))
    return Work(moved, min(gram, tiles), 0.0)


def _spec(op: str) -> Spec:
    mse = op == "attention_mse"
    return Spec(
        op=op,
        make=_make(1 if op == "self_relation_kl" else 2),
        call=_call(op),
        eager=_eager_attention_mse if mse else _eager_relation_kl,
        part=part,
        part_of=part_of,
        work=_work(op),
        bare=_bare if op == "relation_kl" else None,
    )


SPECS = {op: _spec(op) for op in ("relation_kl", "self_relation_kl", "attention_mse")}
