"""relation_kl, self_relation_kl and attention_mse, over all tokens and over windows, as the benchmark sees them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bertkd import functional
from bertkd.bench.cases import Case
from bertkd.bench.lengths import glue_lengths
from bertkd.bench.spec import Inputs, Spec, Work, item_bytes, make_mask, random_tensor

# Tokens to either side in the blocks of ModernBERT that attend to a window.
WINDOW = 64


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


def scores(a: Tensor, b: Tensor, mask: Tensor | None, window: int | None = None) -> Tensor:
    """Scaled scores (B, H, L, L) in the inputs' dtype, a large negative value at pad keys and outside of the window."""
    s = a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5
    keys = attended(mask, window, b)
    return s if keys is None else s.masked_fill(~keys, torch.finfo(s.dtype).min)


def attended(mask: Tensor | None, window: int | None, like: Tensor) -> Tensor | None:
    """Which keys (..., L, D) every row attends to, broadcast to (B, H, L, L); None for all."""
    keys = None if mask is None else mask[:, None, None, :]
    if window is None:
        return keys
    at = torch.arange(like.shape[-2], device=like.device)
    near = ((at[:, None] - at).abs() <= window)[None, None]
    return near if keys is None else keys & near


def kl_of_maps(p_s: Tensor, p_t: Tensor, mask: Tensor | None) -> Tensor:
    """KL(p_t || p_s) of maps, summed over real rows, as the paper's code writes it: clamp, log, kl_div."""
    log_p_s = p_s.float().clamp(1e-7, 1.0).log()
    rows = torch.nn.functional.kl_div(log_p_s, p_t.float(), reduction="none").sum(-1)
    return rows.sum() if mask is None else (rows * mask[:, None, :]).sum()


def _maps(a: Tensor, b: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    # Softmax in float32 and back to the inputs' dtype is what Hugging Face's eager attention does.
    return torch.softmax(scores(a, b, mask, window), -1, dtype=torch.float32).to(a.dtype)


def _eager_relation_kl(window: int | None, inputs: Inputs) -> Tensor:
    a_s, b_s, a_t, b_t = inputs.relation
    ours, theirs = (_maps(a, b, inputs.mask, window) for a, b in ((a_s, b_s), (a_t, b_t)))
    return kl_of_maps(ours, theirs, inputs.mask)


def _eager_attention_mse(window: int | None, inputs: Inputs) -> Tensor:
    a_s, b_s, a_t, b_t = inputs.relation
    # Pad pairs count as nothing; their scores may be anything finite.
    difference = (scores(a_s, b_s, None) - scores(a_t, b_t, None)).float().square()
    if inputs.mask is not None:
        pairs = inputs.mask[:, None, :, None] & inputs.mask[:, None, None, :]
        difference = difference.masked_fill(~pairs, 0.0)
    near = attended(None, window, a_s)
    if near is not None:
        difference = difference.masked_fill(~near, 0.0)
    return difference.sum()


def window_option(window: int | None) -> dict[str, int]:
    """A window as an option, none where there is none: commits that know none are compared with too."""
    return {} if window is None else {"window": window}


def _call(op: str, window: int | None):
    def call(inputs: Inputs, impl: str) -> Tensor:
        options: dict[str, Any] = {"reduction": "sum", "impl": impl, **window_option(window)}
        if op == "self_relation_kl":
            return functional.value_relation_kl(
                inputs.student[0], inputs.teacher[0], inputs.mask, **options
            )
        loss = functional.attention_mse if "mse" in op else functional.relation_kl
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
    """Pairs of a real row and a real key, of all heads."""
    window = WINDOW if case.op.startswith("window_") else case.length
    pairs = 0
    for length in _lengths_of(case):
        reach = min(window, length - 1)
        pairs += length * (2 * reach + 1) - reach * (reach + 1)
    return float(case.heads * pairs)


def tokens_of(case: Case) -> float:
    """Rows that count, of all heads."""
    return float(case.heads * sum(_lengths_of(case)))


def _lengths_of(case: Case) -> list[int]:
    if case.padding == "full":
        return [case.length] * case.batch
    return glue_lengths(case.batch, case.length)


def _work(op: str):
    def work(case: Case, gradient: bool) -> Work:
        """Each tensor read once and each gradient written once; each score and exponential made once."""
        tokens = tokens_of(case)
        sides = 1 if op == "self_relation_kl" else 2
        widths = case.width_s * (2 if gradient else 1) + case.width_t
        moved = tokens * widths * sides * item_bytes(case)
        if "mse" in op:
            return _work_of_mse(case, gradient, tokens, moved)
        pairs = pairs_of(case)
        # Scores of a tensor with itself are symmetric: half of them suffice, and one product gives the gradient.
        share = 0.5 if sides == 1 else 1.0
        flops = 2 * pairs * (case.width_s + case.width_t) * share
        flops += 2 * pairs * case.width_s * sides if gradient else 0
        return Work(moved, flops, 2 * pairs * share)

    return work


def _work_of_mse(case: Case, gradient: bool, tokens: float, moved: float) -> Work:
    """Two Gram matrices (symmetric: half of each) instead of scores where that is less; they know no window."""
    width = case.width_s + case.width_t
    gram = 2 * tokens * width * width + (4 * tokens * width * case.width_s if gradient else 0)
    tiles = 2 * pairs_of(case) * (width + (2 * case.width_s if gradient else 0))
    return Work(moved, tiles if case.op.startswith("window_") else min(gram, tiles), 0.0)


def _spec(op: str, window: int | None = None) -> Spec:
    eager = _eager_attention_mse if "mse" in op else _eager_relation_kl
    return Spec(
        op=op,
        make=_make(1 if op == "self_relation_kl" else 2),
        call=_call(op, window),
        eager=partial(eager, window),
        part=part,
        part_of=part_of,
        work=_work(op),
        bare=_bare if op == "relation_kl" else None,
    )


SPECS = {op: _spec(op) for op in ("relation_kl", "self_relation_kl", "attention_mse")}
SPECS |= {op: _spec(op, WINDOW) for op in ("window_relation_kl", "window_attention_mse")}
