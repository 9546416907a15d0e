"""Terms on hidden states of all tokens or of the first one: Hid-Seq, Hid-CLS, cosine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from bertkd import functional
from bertkd.errors import unknown_name
from bertkd.objectives.base import Memory, Needs, Setup, Shape, StepContext, register_term
from bertkd.objectives.hidden_base import StateTerm
from bertkd.objectives.options import chosen_impl, flag

ON = ("student", "teacher")


@register_term
class HidSeq(StateTerm):
    """Mean over real tokens and channels of (h_s W^T + b - h_t)^2, over pairs of states.

    ``map="combine"`` joins all states of each side along the channels and learns one Linear between
    the two, on the student's side. ``@released`` puts it on the teacher's, as the paper's code does
    (which both sides can bring to 0 together), maps "skip" and counts pads.

    Source: TinyBERT; the paper's Hid-Seq.
    """

    kind: ClassVar[str] = "hid_seq"
    RELEASED: ClassVar[Mapping[str, Any]] = {
        "map": "skip",
        "project": False,
        "count_pads": True,
        "combine_on": "teacher",
    }

    def __init__(
        self,
        setup: Setup,
        *,
        count_pads: bool = False,
        combine_on: str = "student",
        impl: str | None = None,
        **states: Any,
    ) -> None:
        """Make the projections.

        Raises:
            ValueError: a map out of range, or unequal widths with ``project=False``.
        """
        spec = setup.map_of(states.get("map"))
        # A map may be an array, which compares element by element.
        self.combined = isinstance(spec, str) and spec == "combine"
        if combine_on not in ON:
            raise unknown_name("combine_on", str(combine_on), ON)
        if self.combined:
            # Joined states have a Linear of their own, whatever the widths.
            states = {**states, "project": "auto", "pairs": ()}
        super().__init__(setup, **states)
        self.combine_on = combine_on
        self.depths = setup.depths
        self.count_pads = flag("count_pads", count_pads)
        self.impl = chosen_impl(impl, setup.impl)
        if self.combined:
            ours, theirs = ((n + 1) * w for n, w in zip(self.depths, self.widths, strict=True))
            sizes = (ours, theirs) if combine_on == "student" else (theirs, ours)
            self.projections = nn.ModuleList([nn.Linear(*sizes)])
        joins_teacher = self.combined and combine_on == "teacher"
        projected = "hidden_combine_mse" if joins_teacher else "hidden_proj_mse"
        self.op = projected if self.projections else "hidden_mse"

    def needs(self) -> Needs:
        """The states of the pairs, or all of them."""
        if not self.combined:
            return super().needs()
        ours, theirs = (frozenset(range(n + 1)) for n in self.depths)
        return Needs(student_states=ours, teacher_states=theirs)

    def matched(self) -> tuple[int, int]:
        """The states of the pairs, or all of them."""
        if not self.combined:
            return super().matched()
        return self.depths[0] + 1, self.depths[1] + 1

    def map_text(self) -> str:
        """The pairs, or "combine"."""
        return "combine" if self.combined else super().map_text()

    def select(self, step: StepContext, hidden: Tensor) -> Tensor:
        """The tokens compared, (B, L', d); here all."""
        return hidden

    def row_mask(self, step: StepContext) -> Tensor | None:
        """The mask (B, L') of the tokens compared."""
        return step.mask

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs of this step."""
        if self.combined:
            return self._combine(step)
        ours = [self.select(step, step.student.states[s]) for s, _ in self.pairs]
        theirs = [self.select(step, step.teacher.states[t]) for _, t in self.pairs]
        if not self.projections:
            # One launch for all states.
            return self.reduced(self._mse(step, ours, theirs, None), len(ours))
        return self.over_pairs(
            self._mse(step, h_s, h_t, self.projection(i))
            for i, (h_s, h_t) in enumerate(zip(ours, theirs, strict=True))
        )

    def _mse(
        self,
        step: StepContext,
        ours: Tensor | list[Tensor],
        theirs: Tensor | list[Tensor],
        layer: nn.Linear | None,
    ) -> Tensor:
        return functional.hidden_mse(
            ours,
            theirs,
            self.row_mask(step),
            weight=None if layer is None else layer.weight,
            bias=None if layer is None else layer.bias,
            count_pads=self.count_pads,
            impl=self.impl,
        )

    def _combine(self, step: StepContext) -> Tensor:
        ours = [self.select(step, step.student.states[i]) for i in range(self.depths[0] + 1)]
        theirs = [self.select(step, step.teacher.states[i]) for i in range(self.depths[1] + 1)]
        layer = cast(nn.Linear, self.projections[0])
        if self.combine_on == "student":
            return self._mse(step, torch.cat(ours, -1), torch.cat(theirs, -1), layer)
        return functional.hidden_combine_mse(
            ours,
            theirs,
            layer.weight,
            layer.bias,
            self.row_mask(step),
            count_pads=self.count_pads,
            impl=self.impl,
        )


@register_term
class HidCLS(HidSeq):
    """`HidSeq` on each sequence's first real token: mean over examples and channels.

    Source: the paper's Hid-CLS. ``@released``: map "skip".
    """

    kind: ClassVar[str] = "hid_cls"
    RELEASED: ClassVar[Mapping[str, Any]] = {"map": "skip", "project": False}

    def select(self, step: StepContext, hidden: Tensor) -> Tensor:
        """The first real token, (B, 1, d)."""
        return step.first_token(hidden).unsqueeze(1)

    def row_mask(self, step: StepContext) -> Tensor | None:
        """The sequences that have a first token, (B, 1)."""
        return None if step.examples is None else step.examples.unsqueeze(1)

    def memory(self, shape: Shape) -> Memory:
        """Naive: every teacher state; fused: the vectors compared."""
        return self.one_vector(shape)


@register_term
class HidCos(StateTerm):
    """Mean over real tokens of 1 - cos(h_s W^T + b, h_t), over pairs of states.

    Source: DistilBERT (Sanh et al. 2019), which uses the last state.
    """

    kind: ClassVar[str] = "hid_cos"
    op = "hidden_cosine"

    def __init__(
        self, setup: Setup, *, count_pads: bool = False, impl: str | None = None, **states: Any
    ) -> None:
        """Make the projections.

        Raises:
            ValueError: a map out of range, or unequal widths with ``project=False``.
        """
        super().__init__(setup, **states)
        self.count_pads = flag("count_pads", count_pads)
        self.impl = chosen_impl(impl, setup.impl)

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs of this step."""
        return self.over_pairs(
            functional.hidden_cosine(
                self.projected(i, step.student.states[s]),
                step.teacher.states[t],
                step.mask,
                count_pads=self.count_pads,
                impl=self.impl,
            )
            for i, (s, t) in enumerate(self.pairs)
        )
