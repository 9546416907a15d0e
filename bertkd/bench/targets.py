"""What the design sets out to reach, and how far a set of measurements gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bertkd.bench.cases import LETTERS
from bertkd.bench.record import Row
from bertkd.bench.spec import OURS


class Target(NamedTuple):
    """One promise.

    Attributes:
        device: "cpu" or "gpu".
        op: of the case.
        shape: sizes of the case as they stand in its name, "B8 H12 L128 Ds64"; those left out are any.
        mode: of the case.
        impls: whose best counts.
        against: another contestant, or "roofline".
        metric: "time" (wanted: against / ours), "memory" (wanted: ours / against, at most), "roofline".
        factor: what is wanted.
        dtype: of the case.
    """

    device: str
    op: str
    shape: str
    mode: str
    impls: tuple[str, ...]
    against: str
    metric: str
    factor: float
    dtype: str


FUSED = ("native", "triton", "cuda")
_GPU_SHAPES = ("B256 H12 L128 Ds64", "B32 H12 L512 Ds64", "B8 H12 L2048 Ds64")
_CPU_SHAPES = ("B8 H12 L128 Ds64", "B4 H12 L512 Ds64", "B4 H12 L512 Ds32")


def _kernel(
    device: str,
    shapes: tuple[str, ...],
    impls: tuple[str, ...],
    against: str,
    factors: tuple[float, ...],
    dtype: str,
    metric: str = "time",
) -> list[Target]:
    return [
        Target(device, "relation_kl", shape, "fwd_bwd", impls, against, metric, factor, dtype)
        for shape, factor in zip(shapes, factors, strict=True)
    ]


def _step(device: str, op: str, shape: str, factor: float, dtype: str, metric: str = "time"):
    return Target(device, op, shape, "step", OURS, "eager", metric, factor, dtype)


_BF16, _FP32 = "bfloat16", "float32"
_BASE, _MINILM = "bert_base_to_6", "minilm_l6_to_3"
_DECODERS = ("linear_kl", "Ds768", "fwd_bwd", OURS, "eager")

TARGETS: list[Target] = [
    *_kernel("gpu", _GPU_SHAPES, FUSED, "eager", (5, 10, 20), _BF16),
    *_kernel("gpu", _GPU_SHAPES, FUSED, "compile", (3, 3, 3), _BF16),
    *_kernel("gpu", _GPU_SHAPES, FUSED, "linearard", (2, 2, 2), _BF16),
    *_kernel("gpu", _GPU_SHAPES, FUSED, "roofline", (0.5, 0.5, 0.5), _BF16, "roofline"),
    *_kernel("gpu", ("B1 H12 L8192 Ds64",), FUSED, "eager", (0.02,), _BF16, "memory"),
    _step("gpu", _BASE, "B256 L128", 1.5, _BF16),
    _step("gpu", _BASE, "B32 L512", 2.5, _BF16),
    _step("gpu", _BASE, "B256 L128", 0.6, _BF16, "memory"),
    _step("gpu", _BASE, "B32 L512", 0.25, _BF16, "memory"),
    Target("gpu", *_DECODERS, "memory", 0.1, _BF16),
    Target("gpu", *_DECODERS, "time", 1.0, _BF16),
    *_kernel("cpu", _CPU_SHAPES, ("native",), "eager", (3.5, 5, 9), _FP32),
    *_kernel("cpu", _CPU_SHAPES, ("native",), "products", (1, 1, 1), _FP32),
    *_kernel("cpu", _CPU_SHAPES, ("chunked",), "eager", (0.9, 2.5, 2.5), _FP32),
    *_kernel("cpu", ("B1 H12 L4096 Ds64",), ("native",), "eager", (0.02,), _FP32, "memory"),
    Target("cpu", "softmax_kl", "N4096 V30522", "fwd_bwd", ("native",), "eager", "time", 2, _FP32),
    _step("cpu", _MINILM, "B32 L128", 1.1, _FP32),
    _step("cpu", _MINILM, "B8 L512", 2.2, _FP32),
]


class Outcome(NamedTuple):
    """A target, who came nearest to it, and what was reached; None where it was not measured."""

    target: Target
    impl: str
    reached: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target was reached."""
        if self.reached is None:
            return None
        if self.target.metric == "memory":
            return self.reached <= self.target.factor
        return self.reached >= self.target.factor


def outcomes(rows: Sequence[Row], device: str) -> list[Outcome]:
    """How the targets of a device type ("cpu" or "gpu") fare in these rows."""
    return [_outcome(target, rows) for target in TARGETS if target.device == device]


def _outcome(target: Target, rows: Sequence[Row]) -> Outcome:
    mine = [row for row in rows if matches(row, target)]
    values = {(row.impl, row.metric): row.p50 for row in mine if row.p50 is not None}
    reached: dict[str, float] = {}
    for impl in target.impls:
        own = values.get((impl, target.metric))
        other = values.get((target.against, target.metric))
        if own is None:
            continue
        if target.metric == "roofline":
            reached[impl] = own
        elif other is not None:
            reached[impl] = other / own if target.metric == "time" else own / other
    if target.metric == "time" and target.against == "eager":
        # Paired round by round, which cancels slow spells of the machine.
        paired = {impl: values.get((impl, "speedup")) for impl in reached}
        reached.update({impl: value for impl, value in paired.items() if value is not None})
    if not reached:
        return Outcome(target, "|".join(target.impls), None)
    best = min if target.metric == "memory" else max
    impl = best(reached, key=lambda name: reached[name])
    return Outcome(target, impl, reached[impl])


def matches(row: Row, target: Target) -> bool:
    """Whether a measurement is of the case that a target is about."""
    sizes = {f"{letter}{getattr(row, column)}" for column, letter in LETTERS.items()}
    return (
        row.kind in ("op", "step")
        and (row.op, row.mode, row.dtype, row.padding)
        == (target.op, target.mode, target.dtype, "full")
        and sizes.issuperset(target.shape.split())
    )
