"""Loss and terms of recent updates, kept on the device until somebody asks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bertkd.errors import NonFiniteError
from bertkd.training.tracking import finite

NORM = "grad_norm"

# Of fp16's loss. It starts at 2^16 and doubles after 2000 good steps; fairseq gives up here too.
MIN_SCALE = 1e-4


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Put the step's number into a ``NonFiniteError`` that the module itself raises."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"step {step}: {error}") from error


def check_finite(
    meter: Meter,
    step: int,
    module: nn.Module,
    values: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    scaler: Any,
) -> None:
    """``meter.check``, with what ``module.check_finite`` has to say on the cause where there is one.

    A gradient that overflows under fp16 is not an error: the scaler skips the step and lowers its
    scale. One that still overflows at a scale of next to nothing is.
    """
    try:
        meter.check(step, gradient=scaler is None)
        if scaler is not None and (scale := scaler.get_scale()) < MIN_SCALE:
            raise NonFiniteError(
                f"step {step}: the gradient is not finite, at a loss scale of {scale:.2g} too, so that "
                "every step is skipped; try precision='bf16' or 'fp32'"
            )
    except NonFiniteError as error:
        explain: Any = getattr(module, "check_finite", None)
        if explain is not None:
            terms = {name: value for name, value in values.items() if name != "loss"}
            try:
                explain(SimpleNamespace(loss=values["loss"], terms=terms), batch)
            except NonFiniteError as cause:
                raise NonFiniteError(f"{error}; {cause}") from error
        raise


class Meter:
    """One row of values per update; ``read``, ``check`` and ``state`` wait for the device, once each.

    With several processes those three are collective and give the mean over processes.

    Args:
        accelerator: of the run.
        capacity: updates between two calls of ``clear``, at most.
    """

    def __init__(self, accelerator: Accelerator, capacity: int) -> None:
        self.accelerator = accelerator
        self.capacity = capacity
        self.names: list[str] = []
        self.filled = 0
        self._rows = torch.zeros(0)

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add a micro-batch's ``values`` (scalars), times ``weight``, to the present update's."""
        if not self.names:
            self._open([*values, NORM])
        if values.keys() != set(self.names[:-1]):
            raise ValueError(f"the terms changed from {self.names[:-1]} to {list(values)}")
        row = torch.stack([values[name].float() for name in self.names[:-1]])
        self._rows[self.filled, :-1] += row * weight

    def end_update(self, grad_norm: Tensor) -> None:
        """Close the present update's row."""
        self._rows[self.filled, -1] = grad_norm
        self.filled += 1

    def read(self) -> dict[str, float]:
        """Means over the updates since the last ``clear``; of the gradient's norm, the finite ones."""
        rows = self._host()
        means = rows.mean(0)
        norms = rows[:, -1]
        means[-1] = norms[norms.isfinite()].mean()
        return dict(zip(self.names, means.tolist(), strict=True))

    def clear(self) -> None:
        """Start a new window."""
        self.filled = 0
        self._rows.zero_()

    def check(self, step: int, *, gradient: bool = True) -> None:
        """Refuse to go on after a non-finite value.

        Args:
            step: number of the last update added.
            gradient: whether the gradient's norm must be finite too.

        Raises:
            NonFiniteError: naming the first bad update and what was not finite in it.
        """
        bad = ~self._host().isfinite()
        bad[:, -1] &= gradient
        if not bad.any():
            return
        first = int(bad.any(1).nonzero()[0])
        names = [name for name, flag in zip(self.names, bad[first].tolist(), strict=True) if flag]
        late = f" (noticed at step {step})" if first + 1 < self.filled else ""
        raise NonFiniteError(
            f"step {step - self.filled + 1 + first}: {', '.join(names)} not finite{late}"
        )

    def state(self) -> dict[str, Any]:
        """The rows of the window, as JSON values."""
        rows = self._host().tolist() if self.filled else []
        return {"names": self.names, "rows": [[finite(x) for x in row] for row in rows]}

    def load(self, state: Mapping[str, Any], keep: int) -> None:
        """Put back the last ``keep`` rows of what ``state`` returned."""
        rows = state["rows"][-keep:] if keep else []
        if rows:
            self._open(list(state["names"]))
            numbers = [[math.nan if x is None else x for x in row] for row in rows]
            self._rows[: len(rows)] = torch.tensor(numbers, device=self._rows.device)
            self.filled = len(rows)

    def _open(self, names: list[str]) -> None:
        self.names = names
        self._rows = torch.zeros(self.capacity, len(names), device=self.accelerator.device)

    def _host(self) -> Tensor:
        rows = self._rows[: self.filled]
        if self.accelerator.num_processes > 1:
            rows = self.accelerator.reduce(rows.clone(), reduction="mean")
        return rows.double().cpu()
