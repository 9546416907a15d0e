"""Terms on the attention of pairs of blocks: score maps (MSE) and attention maps (KL)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from bertkd import functional
from bertkd.layer_maps import Pairs
from bertkd.objectives.attention_base import AttentionTerm, RelationTerm
from bertkd.objectives.base import Memory, Setup, Shape, StepContext, register_term


@register_term
class AttMSE(AttentionTerm):
    """Mean squared difference of scaled scores before softmax, over pairs of blocks.

    Source: TinyBERT (Jiao et al. 2020); the paper's Att-MSE. ``@released``: scores <= -100 set to
    0, mean over all B*H*L*L entries, pads included.
    """

    kind: ClassVar[str] = "att_mse"
    op = "attention_mse"
    PARTS: ClassVar[str] = "qk"
    RELEASED: ClassVar[Mapping[str, Any]] = {
        "map": "uniform",
        "count_pads": True,
        "min_score": -1e2,
    }

    def __init__(self, setup: Setup, *, min_score: float | None = None, **heads: Any) -> None:
        """Check heads and map.

        Raises:
            ValueError: head counts differ, a map out of range, or options that exclude each other.
        """
        super().__init__(setup, **heads)
        self.min_score = min_score
        if min_score is not None:
            if isinstance(min_score, bool) or not isinstance(min_score, (int, float)):
                raise ValueError(f"min_score must be a number, got {min_score!r}")
            self.need_eager("min_score", heads.get("impl"))

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs of this step."""
        return self.over_windows(step, partial(self._compare, step))

    def _compare(self, step: StepContext, pairs: Pairs, window: int | None) -> Tensor:
        ours, theirs = step.student, step.teacher
        scale_s, scale_t = self.own_scales(step, pairs)
        return functional.attention_mse(
            [ours.q[s] for s, _ in pairs],
            [ours.k[s] for s, _ in pairs],
            [theirs.q[t] for _, t in pairs],
            [theirs.k[t] for _, t in pairs],
            step.mask,
            scale_s=scale_s,
            scale_t=scale_t,
            relation_heads=self.relation_heads,
            window=window,
            count_pads=self.count_pads,
            min_score=self.min_score,
            impl=self.impl,
        )

    def memory(self, shape: Shape) -> Memory:
        """Naive: all maps and one difference per pair; fused: teacher q, k and gradients."""
        pairs = len(self.pairs)
        naive = self.naive_maps(shape) + pairs * self.one_map(shape)
        return Memory(naive, pairs * self.fused_rows(shape))


@register_term
class AttKL(RelationTerm):
    """KL(teacher || student) of the attention maps before dropout, mean over rows and heads.

    Source: MiniLM (Wang et al. 2020), MobileBERT; the paper's Att-KL. ``@released``: student
    probabilities clamped at 1e-7, pad rows counted.
    """

    kind: ClassVar[str] = "att_kl"
    OF_MAPS: ClassVar[bool] = True
    PARTS: ClassVar[str] = "qk"
    RELEASED: ClassVar[Mapping[str, Any]] = {
        "map": "uniform",
        "count_pads": True,
        "min_prob": 1e-7,
    }

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs of this step, each side with its model's own scale."""
        return self.over_windows(step, partial(self._compare, step))

    def _compare(self, step: StepContext, pairs: Pairs, window: int | None) -> Tensor:
        wanted = [(pair, "qk") for pair in pairs]
        return self.relations(step, wanted, scales=self.own_scales(step, pairs), window=window)

    def memory(self, shape: Shape) -> Memory:
        """Naive: all maps and two log-softmaxes per pair; fused: teacher q, k and gradients."""
        pairs = len(self.pairs)
        naive = self.naive_maps(shape) + pairs * 2 * self.one_map(shape)
        return Memory(naive, pairs * self.fused_rows(shape))
