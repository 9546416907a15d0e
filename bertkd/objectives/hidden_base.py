"""What terms on hidden states share: pairs of states and projections between widths."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from bertkd.contrast.base import linear_float32
from bertkd.objectives.base import MappedTerm, Memory, Setup, Shape
from bertkd.objectives.options import flag


def needs_projection(setup: Setup, project: bool | str, term: str) -> bool:
    """Whether the student's states go through a Linear before they are compared.

    Raises:
        ValueError: ``project`` is none of "auto", True, False, or is False while widths differ.
    """
    ours, theirs = setup.student.spec.hidden_size, setup.teacher.spec.hidden_size
    if project == "auto":
        return ours != theirs
    flag("project ('auto' is the third choice)", project)
    if not project and ours != theirs:
        raise ValueError(
            f"{term}(project=False) needs equal widths, but the student's states have {ours} "
            f"channels and the teacher's {theirs}; use project='auto' to learn a Linear"
        )
    return bool(project)


class StateTerm(MappedTerm):
    """A term over pairs of states, with a trained Linear on the student's side where widths differ.

    There is one Linear per pair, or a single one for all with ``shared=True`` (TinyBERT).
    """

    STATES: ClassVar[bool] = True

    def __init__(
        self,
        setup: Setup,
        *,
        project: bool | str = "auto",
        shared: bool = False,
        **layers: Any,
    ) -> None:
        super().__init__(setup, **layers)
        self.widths = (setup.student.spec.hidden_size, setup.teacher.spec.hidden_size)
        self.teacher_states = setup.teacher.spec.num_blocks + 1
        count = 1 if flag("shared", shared) else len(self.pairs)
        count = count if needs_projection(setup, project, self.kind) else 0
        self.projections = nn.ModuleList(nn.Linear(*self.widths) for _ in range(count))

    def projection(self, index: int) -> nn.Linear | None:
        """The Linear of the pair at ``index``, or None."""
        if not self.projections:
            return None
        return cast(nn.Linear, self.projections[0 if len(self.projections) == 1 else index])

    def projected(self, index: int, hidden: Tensor) -> Tensor:
        """``hidden`` (..., d_s), projected to (..., d_t) in float32 where this pair has a Linear."""
        layer = self.projection(index)
        return hidden if layer is None else linear_float32(layer, hidden)

    def matched(self) -> tuple[int, int]:
        """How many states of the student and of the teacher the loss reads."""
        return len(self.pairs), len(self.pairs)

    def memory(self, shape: Shape) -> Memory:
        """Naive: every teacher state and a difference per pair; fused: the matched states only.

        ``output_hidden_states=True`` keeps all of the teacher's states alive; the student's are kept
        for its own backward anyway. The fused loss also keeps its gradient in the student's dtype.
        """
        (ours, theirs), (read, taught) = self.widths, self.matched()
        tokens = shape.batch * shape.length
        naive = self.naive_states(shape) + 4 * tokens * theirs * taught
        fused = tokens * (taught * theirs * shape.teacher_bytes + read * ours * shape.student_bytes)
        return Memory(naive, fused)

    def one_vector(self, shape: Shape) -> Memory:
        """As `memory` for terms that read one float32 vector per sequence and state."""
        (ours, theirs), (read, taught) = self.widths, self.matched()
        return Memory(self.naive_states(shape), 4 * shape.batch * (read * ours + taught * theirs))

    def naive_states(self, shape: Shape) -> int:
        """Bytes of all of the teacher's states."""
        tokens = shape.batch * shape.length
        return tokens * self.widths[1] * shape.teacher_bytes * self.teacher_states
