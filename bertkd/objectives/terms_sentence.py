"""Terms on one vector per sequence: PKD, ALP-KD and mean-pooled sentence embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertkd.contrast.base import linear_float32
from bertkd.errors import unknown_name
from bertkd.layer_maps import MapSpec, Pairs, is_random, state_pairs
from bertkd.objectives.base import (
    Memory,
    Needs,
    Setup,
    Shape,
    StepContext,
    Term,
    register_term,
)
from bertkd.objectives.hidden_base import StateTerm, needs_projection
from bertkd.objectives.options import flag


def pkd_pairs(map: MapSpec, num_student: int, num_teacher: int) -> Pairs:
    """PKD's pairs of states: the student's blocks but the last, with the teacher's.

    "skip": every ``Nt / Ns``-th teacher block (12 -> 6: states 2, 4, 6, 8, 10); "last": those below
    the last (states 7, 8, 9, 10, 11). Anything else is read as `state_pairs` does.

    Raises:
        ValueError: as `state_pairs`, or a one-block student with "skip" or "last".
    """
    if map not in ("skip", "last"):
        return state_pairs(map, num_student, num_teacher)
    if num_student < 2:
        raise ValueError(
            "pkd leaves out the last block, so a student of one block has nothing to match; give "
            f"pairs of states, e.g. pkd(map='1:{num_teacher}')"
        )
    uniform = state_pairs("uniform", num_student, num_teacher)[:-1]
    if map == "skip":
        return uniform
    return tuple((s, num_teacher - num_student + s) for s, _ in uniform)


@register_term
class PKD(StateTerm):
    """|| h_s/|h_s| - h_t/|h_t| ||^2 of the first token, mean over examples, over pairs of states.

    ``map`` "skip" or "last" as the source means them, see `pkd_pairs`. ``@released``: the paper's
    code, which sums over examples and reads "skip" as `state_pairs` does: the embedding and the last
    state included (0, 4, 8, 12), which is what ``embedding=True`` means.

    Source: Patient Knowledge Distillation (Sun et al. 2019).
    """

    kind: ClassVar[str] = "pkd"
    RELEASED: ClassVar[Mapping[str, Any]] = {"examples": "sum", "project": False, "embedding": True}

    def __init__(
        self,
        setup: Setup,
        *,
        map: MapSpec = "skip",
        examples: str = "mean",
        embedding: bool = False,
        **states: Any,
    ) -> None:
        """Check the map and make the projections.

        Raises:
            ValueError: a map out of range, or unequal widths with ``project=False``.
        """
        if is_random(map):
            raise ValueError("pkd has no random map; use 'skip', 'last' or pairs of states")
        pairs_of = state_pairs if flag("embedding", embedding) else pkd_pairs
        pairs = pairs_of(map, *setup.depths)
        super().__init__(setup, pairs=pairs, **states)
        if examples not in ("mean", "sum"):
            raise unknown_name("examples", str(examples), ("mean", "sum"))
        self.examples = examples

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs."""
        return self.over_pairs(self._pair(step, i) for i in range(len(self.pairs)))

    def _pair(self, step: StepContext, index: int) -> Tensor:
        s, t = self.pairs[index]
        ours = self.projected(index, step.first_token(step.student.states[s])).float()
        theirs = step.first_token(step.teacher.states[t]).float()
        distances = (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).square().sum(-1)
        return step.mean(distances) if self.examples == "mean" else step.sum(distances)

    def memory(self, shape: Shape) -> Memory:
        """Naive: every teacher state; fused: the vectors compared."""
        return self.one_vector(shape)


@register_term
class ALP(Term):
    """Mean squared difference of each student state and an attention-weighted mix of the teacher's.

    On first tokens S (B, Ns, d) and T (B, Nt, d): mse(S, softmax(S T^T) T), mean over all elements.
    Gradients flow through the weights, as in the paper's code, unless ``detach=True``.
    ``embedding=True`` (``@released``) includes state 0 on both sides.

    Source: ALP-KD (Passban et al. 2021).
    """

    kind: ClassVar[str] = "alp"
    RELEASED: ClassVar[Mapping[str, Any]] = {"embedding": True, "project": False}

    def __init__(
        self,
        setup: Setup,
        *,
        embedding: bool = False,
        detach: bool = False,
        project: bool | str = "auto",
    ) -> None:
        """Make the projection.

        Raises:
            ValueError: unequal widths with ``project=False``.
        """
        super().__init__()
        self.detach = flag("detach", detach)
        first = 0 if flag("embedding", embedding) else 1
        self.states = tuple(range(first, n + 1) for n in setup.depths)
        self.widths = (setup.student.spec.hidden_size, setup.teacher.spec.hidden_size)
        project = needs_projection(setup, project, self.kind)
        self.projection = nn.Linear(*self.widths) if project else None

    def needs(self) -> Needs:
        """All states, with or without the embedding output."""
        ours, theirs = (frozenset(states) for states in self.states)
        return Needs(student_states=ours, teacher_states=theirs)

    def forward(self, step: StepContext) -> Tensor:
        """The loss."""
        ours, theirs = (
            torch.stack([step.first_token(side.states[i]).float() for i in states], 1)
            for side, states in zip((step.student, step.teacher), self.states, strict=True)
        )
        if self.projection is not None:
            ours = linear_float32(self.projection, ours)
        weights = torch.softmax(ours @ theirs.transpose(1, 2), -1)
        mixed = (weights.detach() if self.detach else weights) @ theirs
        return step.mean((ours - mixed).square().mean((1, 2)))

    def memory(self, shape: Shape) -> Memory:
        """Naive: every teacher state; fused: first tokens only."""
        theirs, count = self.widths[1], len(self.states[1])
        naive = shape.teacher_bytes * shape.batch * shape.length * theirs * (count + 1)
        return Memory(naive, 4 * shape.batch * count * sum(self.widths))

    def map_text(self) -> str:
        """Attention takes the place of a map."""
        return "every state with all"


METRICS = ("cosine", "mse")


@register_term
class Pool(StateTerm):
    """1 - cosine (or squared distance, mean over channels) of mean-pooled states, mean over examples.

    Pooling is over real tokens, as sentence encoders do. The last state unless a map is given.

    Source: sentence-embedding distillation as in Reimers and Gurevych 2020 (mse).
    """

    kind: ClassVar[str] = "pool"

    def __init__(
        self, setup: Setup, *, map: MapSpec = "last", metric: str = "cosine", **states: Any
    ) -> None:
        """Check the map and make the projections.

        Raises:
            ValueError: a map out of range, or unequal widths with ``project=False``.
        """
        super().__init__(setup, map=map, **states)
        if metric not in METRICS:
            raise unknown_name("metric", str(metric), METRICS)
        self.metric = metric

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs."""
        return self.over_pairs(self._pair(step, i) for i in range(len(self.pairs)))

    def _pair(self, step: StepContext, index: int) -> Tensor:
        s, t = self.pairs[index]
        # The projection is linear, so it can come after the mean, on B rows instead of B * L.
        ours = self.projected(index, mean_pool(step.student.states[s], step.mask))
        theirs = mean_pool(step.teacher.states[t], step.mask)
        if self.metric == "mse":
            return step.mean((ours - theirs).square().mean(-1))
        return step.mean(1.0 - F.cosine_similarity(ours, theirs, dim=-1))

    def memory(self, shape: Shape) -> Memory:
        """Naive: every teacher state; fused: the vectors compared."""
        return self.one_vector(shape)


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens, in float32: (B, L, d), (B, L) -> (B, d). All-pad rows give 0."""
    hidden = hidden.float()
    if mask is None:
        return hidden.mean(1)
    real = mask.bool().unsqueeze(-1)
    return hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp_min(1)
