"""What a benchmark knows of an op: its inputs, its two definitions, and the work it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.bench.cases import Case
from bertkd.bench.lengths import glue_lengths

# bertkd's implementations, in the order of tables.
OURS = ("chunked", "native", "triton", "cuda")


class Inputs(NamedTuple):
    """Tensors of a case: the student's get gradients; ``mask`` is (B, L) bool or None."""

    student: list[Tensor]
    teacher: list[Tensor]
    mask: Tensor | None

    def double(self) -> Inputs:
        """The same values in float64."""
        return Inputs(
            [x.double() for x in self.student], [x.double() for x in self.teacher], self.mask
        )

    def contiguous(self) -> Inputs:
        """The same values without the strides that a model leaves."""
        return Inputs(
            [x.contiguous() for x in self.student],
            [x.contiguous() for x in self.teacher],
            self.mask,
        )

    @property
    def relation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a and b of the student, a and b of the teacher; a side of one tensor is related to itself."""
        (a_s, b_s), (a_t, b_t) = (
            side if len(side) == 2 else side * 2 for side in (self.student, self.teacher)
        )
        return a_s, b_s, a_t, b_t

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in (*self.student, *self.teacher))


class Work(NamedTuple):
    """The least that an op must move and compute, whatever the implementation."""

    bytes: float
    flops: float
    exps: float


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Spec:
    """An op as the benchmark sees it. All losses are sums, so that a part's gradient is the whole's.

    Attributes:
        op: its name.
        make: inputs of a case, on a device, from a generator.
        call: bertkd's loss with an ``impl``.
        eager: the loss as one writes it without bertkd, in the inputs' dtype.
        part: a few sequences, heads or rows of the inputs, the rest left out.
        part_of: of the whole's gradients, what must equal the part's; None where it is not comparable.
        work: least work of a case, forward only or with the gradient.
        bare: the matrix products of a case alone, where they are most of it; not a loss but a bound.
        impls: implementations of bertkd that there are of it.
    """

    op: str
    make: Callable[[Case, torch.device, torch.Generator], Inputs]
    call: Callable[[Inputs, str], Tensor]
    eager: Loss
    part: Callable[[Inputs], Inputs]
    part_of: Callable[[Inputs, list[Tensor]], list[Tensor | None]]
    work: Callable[[Case, bool], Work]
    bare: Callable[[Inputs], object] | None = None
    impls: tuple[str, ...] = OURS


def random_tensor(
    shape: tuple[int, ...], case: Case, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Normal random values: zeros would draw less power and run faster than real data."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.to(device, getattr(torch, case.dtype))


def make_mask(case: Case, device: torch.device) -> Tensor | None:
    """None where nothing is padded."""
    if case.padding == "full":
        return None
    lengths = torch.tensor(glue_lengths(case.batch, case.length), device=device)
    return torch.arange(case.length, device=device)[None, :] < lengths[:, None]


def item_bytes(case: Case) -> int:
    """Bytes of one element of the case's dtype."""
    return getattr(torch, case.dtype).itemsize
