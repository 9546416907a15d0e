"""What terms on attention share: heads, relation heads, masks and the memory of maps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bertkd import functional
from bertkd.layer_maps import Pairs
from bertkd.objectives.base import MappedTerm, Needs, Setup, Shape, Side, StepContext
from bertkd.objectives.options import chosen_impl, flag, positive

FLOAT = 4  # maps and row statistics are float32


class AttentionTerm(MappedTerm):
    """What terms over pairs of blocks share: heads, relation heads, masks and memory.

    ``PARTS`` says which of q, k and v a term reads: the teacher's others are not kept until the loss;
    ``RESPLITS`` whether it takes ``relation_heads``; ``OF_MAPS`` whether it compares attention maps or scores,
    which q and k do not make up in every encoder.
    """

    OF_MAPS: ClassVar[bool] = True
    PARTS: ClassVar[str] = "qkv"
    RESPLITS: ClassVar[bool] = True

    def __init__(
        self,
        setup: Setup,
        *,
        relation_heads: int | None = None,
        count_pads: bool = False,
        impl: str | None = None,
        **layers: Any,
    ) -> None:
        super().__init__(setup, **layers)
        self.sides = (setup.student, setup.teacher)
        if self.OF_MAPS:
            check_maps(self.kind, *self.sides)
        self.relation_heads = check_heads(*self.sides, relation_heads, self.kind, self.RESPLITS)
        self.count_pads = flag("count_pads", count_pads)
        self.impl = chosen_impl(impl, setup.impl)
        self._warned = False

    def needs(self) -> Needs:
        """The blocks of the pairs, and what the term reads of the teacher's."""
        return replace(super().needs(), teacher_parts=frozenset(self.PARTS))

    def over_windows(
        self, step: StepContext, loss: Callable[[Pairs, int | None], Tensor]
    ) -> Tensor:
        """Sum (or mean) over the pairs of blocks; ``loss`` is of those that attend to one window together."""
        groups = self._pairs_by_window(step).items()
        losses = [loss(tuple(pairs), window) for window, pairs in groups]
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return self.reduced(total, len(self.pairs))

    def _pairs_by_window(self, step: StepContext) -> dict[int | None, list[tuple[int, int]]]:
        """The pairs by how many tokens to either side both blocks attend to; None: to all.

        Maps of different extents have no divergence. Such a pair is compared over all tokens, with a warning, once.
        """
        found: dict[int | None, list[tuple[int, int]]] = {}
        for ours, theirs in self.pairs:
            length = step.student.q[ours].shape[2]
            window, other = (
                None if own is None or own >= length - 1 else own
                for own in (step.student.window.get(ours), step.teacher.window.get(theirs))
            )
            if window != other:
                self._warn_of_windows((ours, theirs), (window, other), length)
                window = None
            found.setdefault(window, []).append((ours, theirs))
        return found

    def _warn_of_windows(
        self, pair: tuple[int, int], windows: tuple[int | None, int | None], length: int
    ) -> None:
        if self._warned:
            return
        self._warned = True
        ours, theirs = (
            "all tokens" if window is None else f"{window} tokens to either side"
            for window in windows
        )
        warnings.warn(
            f"{self.name} compares student block {pair[0]} with teacher block {pair[1]} over all {length} tokens, "
            f"though the one attends to {ours} and the other to {theirs}; map blocks to blocks "
            "with the same window where the difference matters",
            stacklevel=2,
        )

    def own_scales(self, step: StepContext, pairs: Pairs) -> tuple[float | None, float | None]:
        """The models' own factors on the scores, the same for all pairs; None for re-split heads, which have others.

        Raises:
            ValueError: a model's blocks have different factors.
        """
        if self.relation_heads is not None:
            return None, None
        found = {(step.student.scale[s], step.teacher.scale[t]) for s, t in pairs}
        if len(found) > 1:
            raise ValueError(
                f"{self.name} compares blocks with one softmax scale a model, got (student, teacher) "
                f"{sorted(found)}; write a term for the blocks of each"
            )
        return found.pop()

    def need_eager(self, option: str, impl: str | None) -> None:
        """Refuse an explicit ``impl`` that has no released clamp, and use eager otherwise."""
        if impl not in (None, "auto", "eager"):
            raise ValueError(f"{option} exists in impl='eager' only, got impl={impl!r}; drop one")
        self.impl = "eager"

    def map_text(self) -> str:
        """The pairs, and the relation heads where heads are split anew."""
        text = super().map_text()
        return text if self.relation_heads is None else f"{text} in {self.relation_heads} heads"

    @property
    def map_heads(self) -> int:
        """Maps per example and block."""
        return self.relation_heads or self.sides[0].spec.num_heads

    def naive_maps(self, shape: Shape) -> int:
        """Bytes of every block's maps of both networks: what ``output_attentions=True`` keeps."""
        maps = sum(side.spec.num_heads * side.spec.num_blocks for side in self.sides)
        return FLOAT * shape.batch * maps * shape.length**2

    def one_map(self, shape: Shape) -> int:
        """Bytes of one pair's map."""
        return FLOAT * shape.batch * self.map_heads * shape.length**2

    def fused_rows(self, shape: Shape, tensors: int = 2) -> int:
        """Bytes of one pair: ``tensors`` of the teacher's q, k, v, and the student's gradients of the same.

        The fused losses compute their gradient along with the value and keep it for the backward.
        """
        ours = shape.student_bytes * self.sides[0].width * tensors
        theirs = shape.teacher_bytes * self.sides[1].width * tensors
        return shape.batch * shape.length * (ours + theirs)


def check_maps(term: str, student: Side, teacher: Side) -> None:
    """Refuse an encoder whose attention maps are not made of its queries and keys alone.

    Raises:
        ValueError: naming it.
    """
    for name, side in (("student", student), ("teacher", teacher)):
        if not side.spec.has_maps:
            raise ValueError(
                f"{term} compares attention maps, but the {name} ({side.spec.model_type}) adds relative positions to "
                "the products of its queries and keys; use val_kl or qkv_kl, or terms on states and logits"
            )


def check_heads(
    student: Side, teacher: Side, relation_heads: int | str | None, term: str, resplits: bool
) -> int | None:
    """Check heads that have to be compared one by one, or the relation heads made of them.

    Raises:
        ValueError: head counts differ without ``relation_heads``, it does not divide both widths, or the
            term does not take it (``resplits``).
    """
    if relation_heads is not None and not resplits:
        raise ValueError(f"{term} has no relation_heads; it needs equal head counts")
    if relation_heads is None:
        if student.spec.num_heads != teacher.spec.num_heads:
            ways = ["use qkv_kl"] if term != "qkv_kl" else []
            if resplits:
                most = default_relation_heads(student, teacher)
                ways.insert(0, f"give {term} relation_heads={most}, which re-splits both")
            raise ValueError(
                f"{term} compares heads one by one, but the student has {student.spec.num_heads} "
                f"and the teacher {teacher.spec.num_heads}; {', or '.join(ways)}"
            )
        return None
    if isinstance(relation_heads, bool) or not isinstance(relation_heads, int):
        raise ValueError(f"relation_heads must be a whole number, got {relation_heads!r}")
    widths = (student.width, teacher.width)
    if relation_heads < 1 or any(width % relation_heads for width in widths):
        raise ValueError(
            f"relation_heads={relation_heads} must divide the widths of both, {widths[0]} (student) "
            f"and {widths[1]} (teacher); try {default_relation_heads(student, teacher)}"
        )
    return relation_heads


def default_relation_heads(student: Side, teacher: Side) -> int:
    """Most relation heads with at least 16 teacher and 6 student channels each: 48 for base, 64 for large.

    Six is what a student of width 384 has in the source when it learns from a large teacher.
    """
    ours, theirs = student.width, teacher.width
    most = max(1, min(theirs // 16, ours // 6))
    return next(n for n in range(most, 0, -1) if ours % n == 0 and theirs % n == 0)


class RelationTerm(AttentionTerm):
    """A KL of relations softmax(x y^T * scale) over pairs of blocks; subclasses pick x and y."""

    OF_MAPS: ClassVar[bool] = False
    op = "relation_kl"

    def __init__(
        self,
        setup: Setup,
        *,
        temperature: float = 1.0,
        t_squared: bool = False,
        min_prob: float | None = None,
        **heads: Any,
    ) -> None:
        super().__init__(setup, **heads)
        self.temperature = positive("temperature", temperature)
        self.t_squared = flag("t_squared", t_squared)
        self.min_prob = min_prob
        if min_prob is not None:
            if positive("min_prob", min_prob) >= 1:
                raise ValueError(f"min_prob must be a probability below 1, got {min_prob!r}")
            self.need_eager("min_prob", heads.get("impl"))

    def relations(
        self,
        step: StepContext,
        wanted: Sequence[tuple[tuple[int, int], str]],
        *,
        masked: bool = True,
        scales: tuple[float | None, float | None] = (None, None),
        window: int | None = None,
    ) -> Tensor:
        """Sum of the KLs of relations, each a pair of blocks and two of q, k, v."""
        ours, theirs = step.student, step.teacher
        return functional.relation_kl(
            [getattr(ours, names[0])[s] for (s, _), names in wanted],
            [getattr(ours, names[1])[s] for (s, _), names in wanted],
            [getattr(theirs, names[0])[t] for (_, t), names in wanted],
            [getattr(theirs, names[1])[t] for (_, t), names in wanted],
            step.mask if masked else None,
            scale_s=scales[0],
            scale_t=scales[1],
            temperature=self.temperature,
            t_squared=self.t_squared,
            relation_heads=self.relation_heads,
            window=window,
            count_pads=self.count_pads,
            min_prob=self.min_prob,
            impl=self.impl,
        )
