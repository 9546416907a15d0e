"""Losses on rows as the benchmark sees them: hidden states and logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax, mse_loss, softmax

from bertkd import functional
from bertkd.bench.cases import Case
from bertkd.bench.spec import Inputs, Spec, Work, item_bytes, random_tensor

PART = 64  # rows of a part


def _rows_of(side: list[Tensor], whole: int) -> list[Tensor]:
    """First rows of what has a row per token; weights and biases stay."""
    return [x[:PART] if x.shape[0] == whole else x for x in side]


def _part(inputs: Inputs) -> Inputs:
    whole = inputs.student[0].shape[0]
    return Inputs(_rows_of(inputs.student, whole), _rows_of(inputs.teacher, whole), None)


def _part_of(inputs: Inputs, grads: list[Tensor]) -> list[Tensor | None]:
    whole = inputs.student[0].shape[0]
    # A weight's gradient is a sum over all rows: the part's is another one.
    same = whole <= PART
    return [g[:PART] if g.shape[0] == whole else (g if same else None) for g in grads]


def _states(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    count = max(case.layers, 1)
    sides = [
        [random_tensor((case.rows, width), case, device, generator) for _ in range(count)]
        for width in (case.width_s, case.width_t)
    ]
    return Inputs(sides[0], sides[1], None)


def _projected(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Student: state, weight (d_t, d_s), bias; teacher: state."""
    inputs = _states(case, device, generator)
    weight = random_tensor((case.width_t, case.width_s), case, device, generator)
    bias = random_tensor((case.width_t,), case, device, generator)
    return Inputs([inputs.student[0], weight * case.width_s**-0.5, bias], inputs.teacher, None)


def _combined(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Student: states, one weight (n d_s, n d_t) on the teacher's side, bias; teacher: states."""
    inputs = _states(case, device, generator)
    count = len(inputs.student)
    wide_s, wide_t = count * case.width_s, count * case.width_t
    weight = random_tensor((wide_s, wide_t), case, device, generator) * wide_t**-0.5
    bias = random_tensor((wide_s,), case, device, generator)
    return Inputs([*inputs.student, weight, bias], inputs.teacher, None)


def _logits(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    shape = (case.rows, case.classes)
    sides = [[random_tensor(shape, case, device, generator)] for _ in range(2)]
    return Inputs(sides[0], sides[1], None)


def _decoders(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Either side: state (N, d) and decoder (V, d); logits of unit size."""
    sides = []
    for width in (case.width_s, case.width_t):
        state = random_tensor((case.rows, width), case, device, generator)
        weight = random_tensor((case.classes, width), case, device, generator)
        sides.append([state, weight * width**-0.5])
    return Inputs(sides[0], sides[1], None)


def _eager_hidden(inputs: Inputs) -> Tensor:
    pairs = zip(inputs.student, inputs.teacher, strict=True)
    return sum(
        (mse_loss(s.float(), t.float(), reduction="sum") for s, t in pairs),
        torch.zeros((), device=inputs.student[0].device),
    )


def _eager_projected(inputs: Inputs) -> Tensor:
    state, weight, bias = inputs.student
    return mse_loss(linear(state, weight, bias).float(), inputs.teacher[0].float(), reduction="sum")


def _eager_combined(inputs: Inputs) -> Tensor:
    *states, weight, bias = inputs.student
    target = linear(torch.cat(inputs.teacher, -1), weight, bias)
    return mse_loss(torch.cat(states, -1).float(), target.float(), reduction="sum")


def _eager_cosine(inputs: Inputs) -> Tensor:
    s, t = inputs.student[0].float(), inputs.teacher[0].float()
    return (1 - torch.cosine_similarity(s, t, dim=-1)).sum()


def _kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    return kl_div(log_softmax(z_s.float(), -1), softmax(z_t.float(), -1), reduction="sum")


def _eager_logits(inputs: Inputs) -> Tensor:
    return _kl(inputs.student[0], inputs.teacher[0])


def _eager_decoders(inputs: Inputs) -> Tensor:
    (h_s, w_s), (h_t, w_t) = inputs.student, inputs.teacher
    return _kl(linear(h_s, w_s), linear(h_t, w_t))


def _call_projected(inputs: Inputs, impl: str) -> Tensor:
    state, weight, bias = inputs.student
    return functional.hidden_mse(
        state, inputs.teacher[0], weight=weight, bias=bias, reduction="sum", impl=impl
    )


def _call_combined(inputs: Inputs, impl: str) -> Tensor:
    *states, weight, bias = inputs.student
    mean = functional.hidden_combine_mse(states, inputs.teacher, weight, bias, impl=impl)
    return mean * sum(state.numel() for state in states)


def _call_decoders(inputs: Inputs, impl: str) -> Tensor:
    return functional.linear_kl(*inputs.student, *inputs.teacher, reduction="sum", impl=impl)


def _call_hidden(inputs: Inputs, impl: str) -> Tensor:
    return functional.hidden_mse(inputs.student, inputs.teacher, reduction="sum", impl=impl)


def _call_cosine(inputs: Inputs, impl: str) -> Tensor:
    s, t = inputs.student[0], inputs.teacher[0]
    return functional.hidden_cosine(s, t, reduction="sum", impl=impl)


def _call_logits(inputs: Inputs, impl: str) -> Tensor:
    return functional.softmax_kl(inputs.student[0], inputs.teacher[0], reduction="sum", impl=impl)


def _work_hidden(case: Case, gradient: bool) -> Work:
    passes = case.width_s * (2 if gradient else 1) + case.width_t
    moved = case.rows * max(case.layers, 1) * passes * item_bytes(case)
    return Work(moved, 3.0 * case.rows * max(case.layers, 1) * case.width_t, 0.0)


def _work_projected(case: Case, gradient: bool) -> Work:
    """One product forward, two for the gradients of state and weight."""
    moved = _work_hidden(case, gradient).bytes
    moved += case.width_s * case.width_t * (2 if gradient else 1) * item_bytes(case)
    return Work(moved, 2.0 * case.rows * case.width_s * case.width_t * (3 if gradient else 1), 0.0)


def _work_combined(case: Case, gradient: bool) -> Work:
    """One product forward; the gradient of the weight alone is another, the target needs none."""
    count = max(case.layers, 1)
    moved = _work_hidden(case, gradient).bytes
    moved += count**2 * case.width_s * case.width_t * (2 if gradient else 1) * item_bytes(case)
    product = 2.0 * case.rows * count**2 * case.width_s * case.width_t
    return Work(moved, product * (2 if gradient else 1), 0.0)


def _work_logits(case: Case, gradient: bool) -> Work:
    elements = float(case.rows * case.classes)
    return Work(elements * (3 if gradient else 2) * item_bytes(case), 6 * elements, 2 * elements)


def _work_decoders(case: Case, gradient: bool) -> Work:
    elements = float(case.rows * case.classes)
    widths = case.width_s * (2 if gradient else 1) + case.width_t
    moved = (case.rows + case.classes) * widths * item_bytes(case)
    flops = 2 * elements * (case.width_s * (3 if gradient else 1) + case.width_t)
    return Work(float(moved), flops, 2 * elements)


def _spec(op, make, call, eager, work) -> Spec:
    return Spec(op, make, call, eager, _part, _part_of, work)


SPECS = {
    spec.op: spec
    for spec in (
        _spec("hidden_mse", _states, _call_hidden, _eager_hidden, _work_hidden),
        _spec("hidden_proj_mse", _projected, _call_projected, _eager_projected, _work_projected),
        _spec("hidden_combine_mse", _combined, _call_combined, _eager_combined, _work_combined),
        _spec("hidden_cosine", _states, _call_cosine, _eager_cosine, _work_hidden),
        _spec("softmax_kl", _logits, _call_logits, _eager_logits, _work_logits),
        _spec("linear_kl", _decoders, _call_decoders, _eager_decoders, _work_decoders),
    )
}
