"""From text to a trainable objective: looking terms up, making them, summing them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bertkd._seeding import seeded
from bertkd.errors import unknown_name, whole_number
from bertkd.layer_maps import MapSpec, check_map
from bertkd.objectives.base import (
    TERMS,
    Needs,
    RandomMap,
    Setup,
    StepContext,
    Term,
    option_names,
)
from bertkd.objectives.expression import Expression, TermSpec, syntax_error
from bertkd.objectives.options import check_has_op
from bertkd.objectives.presets import expand
from bertkd.objectives.sides import describe_side


class Objective(nn.Module):
    """A weighted sum of terms. It owns their projections and memory banks.

    ``expression`` is the text it was made from, presets expanded; ``setup`` what the terms know of
    the two models.
    """

    def __init__(self, terms: list[Term], expression: Expression, setup: Setup) -> None:
        super().__init__()
        self.terms = nn.ModuleDict({term.name: term for term in terms})
        self.expression = expression
        self.setup = setup
        drawn = setup.random_map
        self.random_map = None if drawn is None else _RandomState(drawn)

    def in_order(self) -> list[Term]:
        """The terms, in the order of the expression's."""
        return [cast(Term, term) for term in self.terms.values()]

    def redraw(self) -> None:
        """Start a step: draw the "random" layer map anew (in eval mode: use the uniform one)."""
        if self.random_map is None:
            return
        if self.training:
            self.random_map.map.redraw()
        else:
            self.random_map.map.settle()

    def needs(self) -> Needs:
        """What has to be captured at the coming step; changes between steps with random maps."""
        needs = Needs()
        for term in self.in_order():
            needs = needs | term.needs()
        return needs

    def forward(self, step: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute every term, outside autocast.

        Returns:
            The weighted sum, a float32 scalar, and each term's own detached, unweighted value.
        """
        device = _device(step)
        total, values = torch.zeros((), device=device), {}
        with torch.autocast(device.type, enabled=False):
            for term in self.in_order():
                value = term(step).float()
                values[term.name] = value.detach()
                total = total + term.weight * value
        return total, values

    def extra_repr(self) -> str:
        """The objective's text."""
        return str(self.expression)


def _device(step: StepContext) -> torch.device:
    for tensor in (*step.student.states.values(), *step.student.q.values()):
        return tensor.device
    return step.logits("student").device


class _RandomState(nn.Module):
    """Puts the random map's generator into the state_dict, so that resuming draws the same maps.

    It is extra state and no buffer: a generator lives on the CPU, while buffers move to the GPU and
    are broadcast by DDP.
    """

    def __init__(self, random_map: RandomMap) -> None:
        super().__init__()
        self.map = random_map

    def get_extra_state(self) -> Tensor:
        return self.map.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.map.generator.set_state(state.cpu())


def read_objective(objective: str | Expression) -> Expression:
    """Read an objective's text and look all its names up.

    Raises:
        TypeError, ValueError: it cannot be read, or a term or option is unknown (the nearest is
            suggested).
    """
    expression = expand(
        str(objective) if isinstance(objective, Expression) else objective, tuple(TERMS)
    )
    for spec in expression.terms:
        known = option_names(TERMS[spec.kind])
        for name, _ in spec.options:
            if name not in known:
                message = str(unknown_name(f"option of {spec.kind}", name, known or ("none",)))
                raise syntax_error(message, spec.text, spec.position)
    return expression


def build_objective(
    objective: str | Expression,
    student: nn.Module,
    teacher: nn.Module,
    *,
    layer_map: MapSpec = "uniform",
    impl: str = "auto",
    num_examples: int | None = None,
    seed: int = 0,
) -> Objective:
    """Build the terms of an objective for a pair of models.

    Args:
        objective: text such as ``"att_kl + 0.5*hid_seq(map='skip')"``, a preset's name, or a parsed
            expression.
        student, teacher: Hugging Face encoders, bare or with a head.
        layer_map: the map of terms that name none; explicit pairs are of blocks, for terms on states too.
        impl: the implementation of terms that name none.
        num_examples: rows of the training set, for memory banks.
        seed: of projections, banks and random maps. The global generator is left as it was.

    Returns:
        The objective, its parameters on the student's device, float32.

    Raises:
        TypeError, ValueError: the text cannot be read, or a term cannot work with these models; the
            message names the term and what to change.
    """
    expression = read_objective(objective)
    seed = whole_number("seed", seed)
    check_map(layer_map)  # no term may read it
    setup = Setup(
        student=describe_side("student", student),
        teacher=describe_side("teacher", teacher),
        layer_map=layer_map,
        impl=impl,
        num_examples=num_examples,
        seed=seed,
    )
    with torch.device("cpu"), seeded(seed):
        terms = [_build(spec, setup) for spec in expression.terms]
    device = next(student.parameters()).device
    return Objective(terms, expression, setup).to(device)


def _build(spec: TermSpec, setup: Setup) -> Term:
    cls = TERMS[spec.kind]
    options = dict(spec.options)
    if spec.released:
        if not cls.RELEASED:
            raise syntax_error(f"{spec.kind} has no @released variant", spec.text, spec.position)
        options = {**cls.RELEASED, **options}
    try:
        term = cast(Term, cast(Any, cls)(setup, **options))
        if term.op is not None:
            check_has_op(term.impl, term.op)
    except (TypeError, ValueError) as error:
        raise type(error)(f"term {spec.name}: {error}") from error
    term.name, term.weight = spec.name, spec.weight
    return term
