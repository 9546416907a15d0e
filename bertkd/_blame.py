"""Where a loss that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bertkd._session import Recording
from bertkd.objectives import StepContext


def blame(step: StepContext, terms: Mapping[str, Tensor]) -> str:
    """Say which tensor is the first that is not finite, the teacher's before the student's."""
    bad = [name for name, value in terms.items() if not torch.isfinite(value)]
    which = f"loss is not finite (terms: {', '.join(bad) or 'their sum'})"
    for role, recording, logits in (
        ("teacher", step.teacher, step.teacher_logits),
        ("student", step.student, step.student_logits),
    ):
        for place, tensor in _in_forward_order(recording, logits):
            if not torch.isfinite(tensor).all():
                return f"{which}: {role} {place} holds NaN or infinity"
    return (
        f"{which}: the teacher's tensors are finite; look at labels, student and overflow in a term"
    )


def _in_forward_order(recording: Recording, logits: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    last = max([*recording.states, *(block + 1 for block in recording.scale)], default=-1)
    for layer in range(last + 1):
        if layer in recording.states:
            yield f"state {layer}", recording.states[layer]
        for what, kept in (("query", recording.q), ("key", recording.k), ("value", recording.v)):
            if layer in kept:
                yield f"block {layer} {what}", kept[layer]
    if logits is not None:
        yield "logits", logits
