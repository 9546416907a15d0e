"""What every term is made of: its needs, what it sees at a step, and the table of known terms."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bertkd.encoders import EncoderSpec
from bertkd.errors import unknown_name
from bertkd.layer_maps import (
    MapSpec,
    Pairs,
    block_pairs,
    format_pairs,
    is_random,
    outputs,
    shared_state_pairs,
    state_pairs,
)

if TYPE_CHECKING:
    from bertkd.capture import Recording

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Needs:
    """What a term wants from one step; the union of all terms' needs is what gets captured."""

    student_blocks: frozenset[int] = frozenset()
    teacher_blocks: frozenset[int] = frozenset()
    student_states: frozenset[int] = frozenset()
    teacher_states: frozenset[int] = frozenset()
    student_logits: bool = False
    teacher_logits: bool = False
    labels: bool = False
    index: bool = False
    # "q", "k" and "v" of the teacher's blocks; all if empty.
    teacher_parts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.teacher_blocks and not self.teacher_parts:
            object.__setattr__(self, "teacher_parts", frozenset("qkv"))

    def __or__(self, other: Needs) -> Needs:
        """The needs of both."""
        return Needs(*(getattr(self, f) | getattr(other, f) for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class Side:
    """The student or the teacher, as far as terms need to know it before the first step.

    ``head`` is "none", "sequence", "token", "mlm", "foreign" (its logits are no rows of classes) or
    "other"; ``problem`` is "classification", "regression" or "multi_label" and says what labels mean.
    """

    role: str
    spec: EncoderSpec
    head: str = "none"
    problem: str = "classification"
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    head_vocab_size: int = 0

    @property
    def width(self) -> int:
        """Heads times head width: what ``relation_heads`` has to divide."""
        return self.spec.num_heads * self.spec.head_dim


class RandomMap:
    """The "random" layer map: one draw of teacher blocks per step, shared by all terms using it.

    It is a plain object because several terms hold it; `Objective` registers its state.
    """

    def __init__(self, num_student: int, num_teacher: int, seed: int) -> None:
        self._depths = (num_student, num_teacher)
        self.generator = torch.Generator().manual_seed(seed)
        self.blocks: Pairs = block_pairs("uniform", *self._depths)

    def redraw(self) -> None:
        """Draw anew; the states matched are the outputs of the blocks drawn."""
        self.blocks = block_pairs("random", *self._depths, generator=self.generator)

    def settle(self) -> None:
        """Use the uniform map, so that losses of two evaluations can be compared."""
        self.blocks = block_pairs("uniform", *self._depths)

    @property
    def states(self) -> Pairs:
        """The current draw as pairs of states."""
        return outputs(self.blocks)


@dataclass
class Setup:
    """Everything a term's constructor may depend on."""

    student: Side
    teacher: Side
    layer_map: MapSpec = "uniform"
    impl: str = "auto"
    num_examples: int | None = None
    seed: int = 0
    random_map: RandomMap | None = field(default=None, init=False)

    @property
    def depths(self) -> tuple[int, int]:
        """Numbers of blocks of the student and of the teacher."""
        return self.student.spec.num_blocks, self.teacher.spec.num_blocks

    def map_of(self, own: MapSpec | None) -> MapSpec:
        """The map of a term: its own, or else the objective's."""
        return self.layer_map if own is None else own

    def shared_random_map(self) -> RandomMap:
        """The objective's one random map, made when the first term asks for it."""
        if self.random_map is None:
            self.random_map = RandomMap(*self.depths, self.seed)
        return self.random_map


@dataclass
class StepContext:
    """What the terms see of one batch.

    ``mask`` is (B, L), true at real tokens, or None when every token is real. Logits are None
    unless some term needs them; ``batch`` is the user's batch (labels, index).
    """

    student: Recording
    teacher: Recording
    mask: Tensor | None = None
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    batch: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, role: str) -> Tensor:
        """The logits of the "student" or the "teacher".

        Raises:
            RuntimeError: no term said in its `Needs` that it wants them.
        """
        logits = self.student_logits if role == "student" else self.teacher_logits
        if logits is None:
            raise RuntimeError(f"the {role}'s logits were not kept; say so in the term's Needs")
        return logits

    @cached_property
    def examples(self) -> Tensor | None:
        """(B,), true at sequences with a real token: the others only fill the batch up. None if there is no mask."""
        return None if self.mask is None else self.mask.bool().any(1)

    def sum(self, per_example: Tensor) -> Tensor:
        """Sum of (B,) over the sequences with a real token."""
        examples = self.examples
        if examples is not None:
            per_example = per_example.where(examples.to(per_example.device), 0.0)
        return per_example.sum()

    def mean(self, per_example: Tensor) -> Tensor:
        """Mean of (B,) over the sequences with a real token; 0 where none has one."""
        examples = self.examples
        count = len(per_example) if examples is None else examples.sum().clamp_min(1)
        return self.sum(per_example) / count

    def first_token(self, hidden: Tensor) -> Tensor:
        """(B, L, d) -> (B, d): each row's first real token, so that left padding keeps its CLS."""
        if self._first is None:
            return hidden[:, 0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, self._first.to(hidden.device)]

    @cached_property
    def _first(self) -> Tensor | None:
        """(B,) positions of the first real tokens, looked for once for all states; None where all are at 0."""
        return None if self.mask is None else self.mask.bool().to(torch.uint8).argmax(1)


@dataclass(frozen=True)
class Shape:
    """The batch a plan is made for; ``*_bytes`` are the sizes of one element of each network."""

    batch: int
    length: int
    student_bytes: int = 4
    teacher_bytes: int = 4


@dataclass(frozen=True)
class Memory:
    """Bytes a term keeps until the backward pass, done the usual way and done here."""

    naive: int
    fused: int


class Term(nn.Module):
    """One named loss of an objective.

    Subclasses set ``kind`` and take their options as keyword arguments after ``setup``; those names
    are what users may write. ``RELEASED`` holds the defaults that change under ``@released``; it is
    empty where there is no such variant.
    """

    kind: ClassVar[str] = ""
    RELEASED: ClassVar[Mapping[str, Any]] = {}
    # Stem of the op that computes the term by its ``impl``; None where PyTorch does.
    op: str | None = None
    impl: str = "auto"

    def __init__(self) -> None:
        super().__init__()
        self.name = self.kind
        self.weight = 1.0

    def needs(self) -> Needs:
        """What this term wants captured at the coming step."""
        raise NotImplementedError

    def forward(self, step: StepContext) -> Tensor:
        """The unweighted loss, a float32 scalar."""
        raise NotImplementedError

    def memory(self, shape: Shape) -> Memory:
        """Bytes kept for the backward pass by this term."""
        raise NotImplementedError

    def map_text(self) -> str:
        """The layers matched, for tables."""
        return "-"


class MappedTerm(Term):
    """A term over pairs of layers; subclasses say whether those are blocks or states.

    A subclass may give ``pairs`` in place of a map; users cannot, as only keyword-only arguments are options.
    """

    STATES: ClassVar[bool] = False

    def __init__(
        self,
        setup: Setup,
        pairs: Pairs | None = None,
        *,
        map: MapSpec | None = None,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise unknown_name("reduction", str(reduction), REDUCTIONS)
        self.reduction = reduction
        spec = setup.map_of(map)
        self._random: RandomMap | None = None
        self._pairs: Pairs = ()
        if pairs is not None:
            self._pairs = pairs
        elif is_random(spec):
            self._random = setup.shared_random_map()
        elif self.STATES:
            pairs_of = shared_state_pairs if map is None else state_pairs
            self._pairs = pairs_of(spec, *setup.depths)
        else:
            self._pairs = block_pairs(spec, *setup.depths)

    @property
    def pairs(self) -> Pairs:
        """Pairs (student, teacher) of blocks or states matched at this step."""
        if self._random is None:
            return self._pairs
        return self._random.states if self.STATES else self._random.blocks

    def needs(self) -> Needs:
        """The layers of the pairs."""
        ours = frozenset(s for s, _ in self.pairs)
        theirs = frozenset(t for _, t in self.pairs)
        if self.STATES:
            return Needs(student_states=ours, teacher_states=theirs)
        return Needs(student_blocks=ours, teacher_blocks=theirs)

    def over_pairs(self, losses: Iterable[Tensor]) -> Tensor:
        """Sum (or mean) of the pairs' losses."""
        each = list(losses)
        return self.reduced(torch.stack(each).sum(), len(each))

    def reduced(self, total: Tensor, count: int) -> Tensor:
        """The sum of ``count`` losses as it is, or their mean."""
        return total if self.reduction == "sum" else total / count

    def map_text(self) -> str:
        """The pairs as text, marked when they are redrawn."""
        text = format_pairs(self.pairs)
        return f"random, now {text}" if self._random else text


TERMS: dict[str, type[Term]] = {}


def register_term(cls: type[Term]) -> type[Term]:
    """Class decorator: make a term known by its ``kind``.

    Raises:
        ValueError: the kind is empty or already taken.
        TypeError: it lacks a method that every term has.
    """
    lacking = [m for m in ("needs", "forward", "memory") if getattr(cls, m) is getattr(Term, m)]
    if lacking:
        raise TypeError(
            f"term {cls.kind!r}: {cls.__name__} does not define {', '.join(lacking)}; see Term for what they return"
        )
    if not cls.kind.isidentifier() or cls.kind in TERMS:
        raise ValueError(f"term kind {cls.kind!r} is not a free name; known: {', '.join(TERMS)}")
    TERMS[cls.kind] = cls
    return cls


def option_names(cls: type[Term]) -> tuple[str, ...]:
    """Options a term takes: the keyword-only arguments of its constructor.

    Where a constructor hands ``**`` on, the options of its base classes count too.
    """
    names: list[str] = []
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return tuple(dict.fromkeys(names))
