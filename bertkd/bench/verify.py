"""No figure for a wrong result: a contestant is held against the float64 reference before it is timed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.bench import peers
from bertkd.bench.contestants import OURS, run_once
from bertkd.bench.ops import SPECS
from bertkd.bench.spec import Inputs, Loss
from bertkd.ops.verify import relative_error

# Ours: at most twice the error of the eager definition in the same dtype, and this.
FLOOR = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Others need only compute the same loss: bfloat16 maps cost them digits that are theirs to lose.
LIMIT_OF_PEERS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}
# The whole case's loss against that of eager, in case something is wrong far from the part.
WHOLE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-2}


class Verdict(NamedTuple):
    """``wrong`` says what is wrong, or is None; ``error`` is the largest relative error found."""

    error: float
    wrong: str | None


class Oracle:
    """What a case must give: float64 values of a part, and the error that its dtype costs."""

    def __init__(self, op: str, inputs: Inputs) -> None:
        self.spec, self.inputs = SPECS[op], inputs
        self.part = self.spec.part(inputs)
        exact = self.part.double()
        self.exact = run_once(lambda x: self.spec.call(x, "eager"), "fwd_bwd", exact)
        same = run_once(lambda x: self.spec.call(x, "eager"), "fwd_bwd", self.part)
        self.rounding = [relative_error(a, b) for a, b in zip(same, self.exact, strict=True)]
        self.dtype = str(inputs.student[0].dtype).removeprefix("torch.")
        self.whole = self._whole()

    def _whole(self) -> float | None:
        try:
            return run_once(self.spec.eager, "fwd", self.inputs)[0].item()
        except torch.OutOfMemoryError:
            return None

    def judge(self, impl: str, loss: Loss, mode: str) -> Verdict:
        """Run a contestant on the part and on the whole case, and compare.

        Args:
            impl: its name; ours are held to a stricter limit.
            loss: its loss.
            mode: "fwd" compares the loss alone.
        """
        gradient_only = (impl, self.spec.op) in peers.GRADIENT_ONLY
        if gradient_only and mode == "fwd":
            mode = "fwd_bwd"
        on_part = run_once(loss, mode, self.part)
        on_whole = run_once(loss, mode, self.inputs)
        worst = 0.0
        for place, (got, want) in enumerate(zip(on_part, self.exact, strict=False)):
            if place == 0 and gradient_only:
                continue
            worst, wrong = self._compare(worst, impl, place, got, want, "a part")
            if wrong:
                return Verdict(worst, wrong)
        gradients = on_whole[1:]
        comparable = self.spec.part_of(self.inputs, gradients) if gradients else []
        for place, part in enumerate(comparable, start=1):
            if part is not None:
                worst, wrong = self._compare(
                    worst, impl, place, part, self.exact[place], "the case"
                )
                if wrong:
                    return Verdict(worst, wrong)
        return Verdict(worst, None if gradient_only else self._compare_whole(on_whole[0]))

    def _compare(
        self, worst: float, impl: str, place: int, got: Tensor, want: Tensor, where: str
    ) -> tuple[float, str | None]:
        error = relative_error(got, want)
        limit = LIMIT_OF_PEERS[self.dtype]
        if impl in OURS:
            limit = 2 * self.rounding[place] + FLOOR[self.dtype]
        what = f"gradient {place}" if place else "loss"
        worst = max(worst, error) if math.isfinite(error) else math.inf
        # Not "error > limit": NaN must fail too.
        if not error <= limit:
            return worst, f"{what} of {where} is off by {error:.1e} (limit {limit:.1e})"
        return worst, None

    def _compare_whole(self, loss: Tensor) -> str | None:
        if self.whole is None:
            return None
        value, limit = loss.item(), WHOLE[self.dtype] * max(abs(self.whole), 1e-6)
        if not abs(value - self.whole) <= limit:
            return f"the case's loss is {value:.6g}, eager's {self.whole:.6g}"
        return None
