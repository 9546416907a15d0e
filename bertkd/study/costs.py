"""What a student saves: parameters, latency, and what the fused loss saves in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bertkd.encoders import describe
from bertkd.functional import attention_kl
from bertkd.plan import count_parameters
from bertkd.study.latency import Latency, measure_latency
from bertkd.study.memory import peak_extra_bytes

# A batch as in the demo's training, and one as in pretraining.
LOSS_SHAPES = ((32, 64), (8, 512))


@dataclass(frozen=True)
class LossMemory:
    """Peak extra bytes of ``attention_kl``, forward and backward, for one pair of blocks."""

    batch: int
    heads: int
    length: int
    head_dim: int
    eager: int
    fused: int


@dataclass(frozen=True)
class Costs:
    """Costs of a teacher and its student.

    Attributes:
        parameters: by model, ``"teacher"`` and ``"student"``.
        blocks: by model.
        latency: of one batch of ``latency_batch`` texts, by model.
        latency_batch: texts per batch.
        loss_memory: eager against fused, at several shapes.
    """

    parameters: dict[str, int]
    blocks: dict[str, int]
    latency: Latency
    latency_batch: int
    loss_memory: list[LossMemory]

    @property
    def speedup(self) -> float:
        """How many times faster the student is than the teacher."""
        return self.latency.seconds["teacher"] / self.latency.seconds["student"]


def measure_costs(
    teacher: nn.Module,
    student: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    rounds: int = 15,
    tick: Callable[[float], object] = lambda fraction: None,
) -> Costs:
    """Measure both models on ``texts`` as one batch, and the loss between them.

    Args:
        teacher, student: encoders on one device.
        tokenizer: of both.
        texts: the batch, cut to 128 tokens each.
        rounds: timed forward passes of each.
        tick: told the fraction done.
    """
    device = next(student.parameters()).device
    models = {"teacher": teacher, "student": student}
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"
    ).to(device)

    def forward(model: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: model(**batch))

    for model in models.values():
        model.eval()
    latency = measure_latency(
        {name: forward(model) for name, model in models.items()}, device=device, rounds=rounds
    )
    tick(0.7)
    spec = describe(student)
    memory = [
        measure_loss_memory(batch, spec.num_heads, length, spec.head_dim, device)
        for batch, length in LOSS_SHAPES
    ]
    return Costs(
        parameters={name: count_parameters(model) for name, model in models.items()},
        blocks={name: describe(model).num_blocks for name, model in models.items()},
        latency=latency,
        latency_batch=len(texts),
        loss_memory=memory,
    )


def measure_loss_memory(
    batch: int, heads: int, length: int, head_dim: int, device: torch.device | str = "cpu"
) -> LossMemory:
    """Run ``attention_kl`` forward and backward on random (batch, heads, length, head_dim) tensors."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, length, head_dim)
    q_s, k_s, q_t, k_t = (torch.randn(shape, generator=generator).to(device) for _ in range(4))

    def run(impl: str) -> Callable[[], None]:
        def work() -> None:
            q, k = q_s.clone().requires_grad_(), k_s.clone().requires_grad_()
            attention_kl(q, k, q_t, k_t, impl=impl).backward()

        return work

    peaks = {impl: peak_extra_bytes(run(impl), device) for impl in ("eager", "auto")}
    return LossMemory(batch, heads, length, head_dim, peaks["eager"], peaks["auto"])
