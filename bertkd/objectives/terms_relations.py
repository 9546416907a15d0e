"""Terms on relations of q, k and v with themselves: Val-KL and MiniLMv2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from bertkd.errors import unknown_name
from bertkd.objectives.attention_base import RelationTerm, default_relation_heads
from bertkd.objectives.base import Memory, Setup, Shape, Side, StepContext, register_term
from bertkd.objectives.options import flag


@register_term
class ValKL(RelationTerm):
    """KL(teacher || student) of the value relation softmax(v v^T / sqrt(D)).

    Source: MiniLM (Wang et al. 2020); the paper's Val-KL. ``@released``: no mask at all (pads are
    keys too), pad rows counted, the student's sqrt(D) on both sides.
    """

    kind: ClassVar[str] = "val_kl"
    PARTS: ClassVar[str] = "v"
    SCALES: ClassVar[tuple[str, ...]] = ("own", "student")
    RELEASED: ClassVar[Mapping[str, Any]] = {
        "map": "uniform",
        "count_pads": True,
        "masked": False,
        "scale": "student",
    }

    def __init__(
        self,
        setup: Setup,
        *,
        masked: bool = True,
        scale: str = "own",
        **shared: Any,
    ) -> None:
        """Check heads and map.

        Raises:
            ValueError: head counts differ, a map out of range, or options that exclude each other.
        """
        super().__init__(setup, **shared)
        self.masked = flag("masked", masked)
        if scale not in self.SCALES:
            raise unknown_name("scale", str(scale), self.SCALES)
        channels = self.sides[0].width // self.map_heads
        self._scales = (None, None if scale == "own" else channels**-0.5)

    def forward(self, step: StepContext) -> Tensor:
        """The loss over the pairs of this step."""
        wanted = [(pair, "vv") for pair in self.pairs]
        total = self.relations(step, wanted, masked=self.masked, scales=self._scales)
        return self.reduced(total, len(wanted))

    def memory(self, shape: Shape) -> Memory:
        """Naive: scores and log-softmax of both sides per pair; fused: the teacher's v and a gradient."""
        pairs = len(self.pairs)
        return Memory(pairs * 4 * self.one_map(shape), pairs * self.fused_rows(shape, 1))


@register_term
class QKVKL(RelationTerm):
    """Sum of the KLs of the q-q, k-k and v-v relations of one student and one teacher block.

    Heads are joined and split into ``relation_heads`` on both sides, so head counts may differ;
    "auto" takes 48 for base and 64 for large teachers as the source does, fewer where these do not
    divide both widths; the plan says how many. Blocks are the last ones unless given. Source: MiniLMv2
    (Wang et al. 2021). ``@released``: the models' own heads, no mask, pad rows counted.
    """

    kind: ClassVar[str] = "qkv_kl"
    RELEASED: ClassVar[Mapping[str, Any]] = {
        "relation_heads": None,
        "count_pads": True,
        "masked": False,
    }

    def __init__(
        self,
        setup: Setup,
        *,
        student_block: int | None = None,
        teacher_block: int | None = None,
        relation_heads: int | str | None = "auto",
        temperature: float = 1.0,
        t_squared: bool = False,
        count_pads: bool = False,
        masked: bool = True,
        impl: str | None = None,
    ) -> None:
        """Check the blocks and relation heads.

        Raises:
            ValueError: a block out of range, or relation heads that do not divide both widths.
        """
        if relation_heads == "auto":
            relation_heads = default_relation_heads(setup.student, setup.teacher)
        pair = (
            _block("student_block", student_block, setup.student),
            _block("teacher_block", teacher_block, setup.teacher),
        )
        super().__init__(
            setup,
            pairs=(pair,),
            relation_heads=relation_heads,
            count_pads=count_pads,
            temperature=temperature,
            t_squared=t_squared,
            impl=impl,
        )
        self.masked = flag("masked", masked)

    def forward(self, step: StepContext) -> Tensor:
        """The sum of the three relations' losses."""
        wanted = [(self.pairs[0], names) for names in ("qq", "kk", "vv")]
        return self.relations(step, wanted, masked=self.masked)

    def memory(self, shape: Shape) -> Memory:
        """Naive: scores and log-softmax of both sides, three times; fused: theirs, and gradients."""
        return Memory(3 * 4 * self.one_map(shape), 3 * self.fused_rows(shape, 1))


def _block(name: str, value: int | None, side: Side) -> int:
    depth = side.spec.num_blocks
    if value is None:
        return depth - 1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < depth:
        raise ValueError(f"{name} must be one of 0..{depth - 1} (0-based), got {value!r}")
    return value
