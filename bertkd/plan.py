"""What a distillation will do and need, as a table, before any of it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from bertkd.errors import whole_number
from bertkd.objectives.base import Shape

if TYPE_CHECKING:
    from bertkd.objectives import Objective

EXPLANATION = """\
map:   blocks, 0-based; of terms on states 0 is the embedding output and i + 1 the output of block i;
naive: kept until the backward by a loss on output_attentions=True / output_hidden_states=True, that
       is float32 maps of B H L^2 of every block and all teacher states (in each term that uses them);
fused: kept here, that is the teacher's matched q, k, v and states, and gradients of the student's."""


@dataclass(frozen=True)
class TermPlan:
    """One term of a plan; ``*_bytes`` are kept from the forward to the backward pass."""

    name: str
    text: str
    weight: float
    layer_map: str
    naive_bytes: int
    fused_bytes: int


@dataclass(frozen=True)
class Plan:
    """What `Distiller.plan` returns; ``str(plan)`` is a table."""

    objective: str
    terms: tuple[TermPlan, ...]
    batch_size: int
    length: int
    student_blocks: int
    teacher_blocks: int
    student_parameters: int
    teacher_parameters: int
    objective_parameters: int
    student_attention: str
    teacher_attention: str

    def __str__(self) -> str:
        """A fixed-width table with the explanation of its byte columns."""
        header = ("term", "weight", "layer map (student:teacher)", "naive", "fused")
        rows = [
            (
                term.name,
                f"{term.weight:g}",
                _shortened(term.layer_map),
                human_bytes(term.naive_bytes),
                human_bytes(term.fused_bytes),
            )
            for term in self.terms
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            f"objective  {self.objective}",
            f"teacher    {self.teacher_blocks} blocks, {self.teacher_parameters:,} parameters (frozen), "
            f"{self.teacher_attention} attention",
            f"student    {self.student_blocks} blocks, {self.student_parameters:,} parameters, "
            f"{self.student_parameters / max(self.teacher_parameters, 1):.0%} of the teacher, "
            f"{self.student_attention} attention",
            f"own        {self.objective_parameters:,} parameters of the objective (projections)",
            "",
            f"loss memory at batch {self.batch_size}, length {self.length}:",
            _line(header, widths),
            "  ".join("-" * width for width in widths),
            *(_line(row, widths) for row in rows),
            "",
            EXPLANATION,
        ]
        return "\n".join(lines)


def make_plan(
    teacher: nn.Module,
    student: nn.Module,
    objective: Objective,
    batch_size: int,
    length: int,
    attention: tuple[str, str],
) -> Plan:
    """Count parameters and the bytes of each term.

    Args:
        teacher, student: the models; the sizes of their elements are those of their parameters.
        objective: the objective built for them.
        batch_size: sequences per forward.
        length: tokens per sequence, padding included.
        attention: names of the attention implementations that teacher and student run with.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, or a length that a model has no positions for.
    """
    setup = objective.setup
    batch_size = whole_number("batch_size", batch_size, least=1)
    length = whole_number("length", length, least=1)
    for side in (setup.student, setup.teacher):
        most = side.spec.max_positions
        if most is not None and length > most:
            raise ValueError(f"length {length} is more than the {side.role}'s {most} positions")
    shape = Shape(batch_size, length, _element_size(student), _element_size(teacher))
    plans = []
    for term, spec in zip(objective.in_order(), objective.expression.terms, strict=True):
        memory = term.memory(shape)
        plans.append(
            TermPlan(term.name, str(spec), term.weight, term.map_text(), memory.naive, memory.fused)
        )
    return Plan(
        objective=str(objective.expression),
        terms=tuple(plans),
        batch_size=batch_size,
        length=length,
        student_blocks=setup.student.spec.num_blocks,
        teacher_blocks=setup.teacher.spec.num_blocks,
        student_parameters=count_parameters(student),
        teacher_parameters=count_parameters(teacher),
        objective_parameters=count_parameters(objective),
        student_attention=attention[1],
        teacher_attention=attention[0],
    )


def human_bytes(count: int) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    whole = units[0] == "B" or value >= 100
    return f"{value:,.0f} {units[0]}" if whole else f"{value:.1f} {units[0]}"


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _element_size(module: nn.Module) -> int:
    return next(module.parameters()).element_size()


def _shortened(text: str) -> str:
    return text if len(text) <= 44 else text[:41] + "..."


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    # Names to the left, numbers to the right.
    return "  ".join(
        cell.ljust(width) if i in (0, 2) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
