"""The cases: every op at the shapes that matter, the most important first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bertkd.bench.record import SHAPE_COLUMNS, Row

# What a case and its rows have in common.
CASE_COLUMNS = ("kind", "op", *SHAPE_COLUMNS, "dtype", "padding")


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: an op of ``ops.SPECS``, or for a training step a pair of networks of ``step_models.PAIRS``.
        batch, heads, length, width_s, width_t: of attention ops.
        rows, classes, layers: of the others (``width_s`` and ``width_t`` are their hidden widths); of a training step,
            ``layers`` is the number of matched blocks.
        processes: of data-parallel training; 0 without.
        dtype: of all inputs.
        padding: "full", or "glue": sequences as long as GLUE's, padded to ``length``.
        importance: cases of a smaller number come first; a time budget drops the last.
        kind: "op", or "scaling" for the sweeps that show how cost grows.
    """

    op: str
    batch: int = 0
    heads: int = 0
    length: int = 0
    width_s: int = 0
    width_t: int = 0
    rows: int = 0
    classes: int = 0
    layers: int = 0
    processes: int = 0
    dtype: str = "float32"
    padding: str = "full"
    importance: int = 1
    kind: str = "op"

    @classmethod
    def of(cls, row: Row) -> Case:
        """The case that a row is about; its importance is lost."""
        return cls(**{name: getattr(row, name) for name in CASE_COLUMNS})

    @property
    def name(self) -> str:
        """E.g. ``relation_kl[B8 H12 L128 Ds64 Dt64 float32]``."""
        sizes = [f"{LETTERS[c]}{getattr(self, c)}" for c in SHAPE_COLUMNS if getattr(self, c)]
        padding = [] if self.padding == "full" else [self.padding]
        return f"{self.op}[{' '.join([*sizes, self.dtype, *padding])}]"

    @property
    def columns(self) -> dict[str, Any]:
        """The case's part of a row."""
        return {name: getattr(self, name) for name in CASE_COLUMNS}


LETTERS = {
    "batch": "B",
    "heads": "H",
    "length": "L",
    "width_s": "Ds",
    "width_t": "Dt",
    "rows": "N",
    "classes": "V",
    "layers": "n",
    "processes": "P",
}


def attention(op: str, shape: tuple[int, int, int, int], dtype: str, **options) -> Case:
    """A case of an attention op with equal head widths, shape (B, H, L, D)."""
    batch, heads, length, width = shape
    return Case(op, batch, heads, length, width, width, dtype=dtype, **options)


def _cpu() -> list[Case]:
    main, long = [(8, 12, 128, 64), (4, 12, 512, 64), (4, 12, 512, 32)], (1, 12, 4096, 64)
    fp32 = "float32"
    cases = [attention("relation_kl", shape, fp32) for shape in main]
    cases.append(attention("relation_kl", main[0], fp32, padding="glue", importance=2))
    cases.append(attention("relation_kl", long, fp32))
    for op in ("self_relation_kl", "attention_mse"):
        cases += [attention(op, shape, fp32, importance=2) for shape in main[:2]]
    cases += [
        attention("window_relation_kl", shape, fp32, importance=2) for shape in (main[1], long)
    ]
    cases.append(attention("window_attention_mse", long, fp32, importance=3))
    cases += [
        Case("hidden_mse", width_s=384, width_t=384, rows=4096, layers=3, importance=2),
        Case("hidden_proj_mse", width_s=384, width_t=768, rows=2048, importance=2),
        Case("hidden_combine_mse", width_s=384, width_t=384, rows=2048, layers=3, importance=3),
        Case("hidden_cosine", width_s=384, width_t=384, rows=4096, importance=3),
        *(
            Case("softmax_kl", rows=n, classes=30522, importance=i)
            for n, i in ((4096, 1), (512, 2))
        ),
        Case("linear_kl", width_s=384, width_t=768, rows=256, classes=30522, importance=2),
    ]
    cases += [attention("self_attention", shape, fp32, importance=2) for shape in main]
    cases.append(attention("window_self_attention", (1, 12, 2048, 64), fp32, importance=2))
    # Equal numbers of tokens, so that what grows is the cost of length alone.
    cases += [
        attention("relation_kl", (2048 // n, 12, n, 32), fp32, importance=3, kind="scaling")
        for n in (64, 128, 256, 512, 1024, 2048)
    ]
    cases += [
        attention("relation_kl", (b, h, 128, 32), fp32, importance=4, kind="scaling")
        for b, h in ((1, 12), (4, 12), (8, 12), (4, 3), (4, 6), (4, 24))
    ]
    return cases


def _cuda() -> list[Case]:
    main = [(256, 12, 128, 64), (32, 12, 512, 64), (8, 12, 2048, 64)]
    bf16 = "bfloat16"
    cases = [attention("relation_kl", shape, bf16) for shape in (*main, (1, 12, 8192, 64))]
    cases += [
        attention("relation_kl", shape, bf16, padding="glue", importance=2) for shape in main[:2]
    ]
    cases += [
        attention("relation_kl", main[0], dtype, importance=3) for dtype in ("float16", "float32")
    ]
    # Where the launches of whole heads meet: what "auto" should take for short sequences.
    cases += [
        attention("relation_kl", shape, bf16, importance=2)
        for shape in ((512, 12, 64, 64), (1024, 12, 32, 64), (256, 12, 128, 32))
    ]
    for op in ("self_relation_kl", "attention_mse"):
        cases += [attention(op, shape, bf16, importance=2) for shape in main]
    # The first one important enough for FlexAttention, whose show-piece windows are.
    cases += [
        attention("window_relation_kl", (8, 12, 2048, 64), bf16),
        attention("window_relation_kl", (1, 12, 8192, 64), bf16, importance=2),
        attention("window_attention_mse", (8, 12, 2048, 64), bf16, importance=2),
    ]
    wide: dict[str, Any] = {"width_s": 768, "width_t": 768, "dtype": bf16}
    cases += [
        Case("linear_kl", rows=4096, classes=30522, importance=1, **wide),
        Case("softmax_kl", rows=4096, classes=30522, dtype=bf16, importance=2),
        Case("hidden_mse", rows=32768, layers=6, importance=2, **wide),
        Case("hidden_proj_mse", 0, 0, 0, 384, 768, rows=32768, dtype=bf16, importance=2),
        Case("hidden_combine_mse", rows=32768, layers=6, importance=3, **wide),
        Case("hidden_cosine", rows=32768, importance=3, **wide),
    ]
    cases += [
        attention("relation_kl", (32768 // n, 12, n, 64), bf16, importance=3, kind="scaling")
        for n in (128, 256, 512, 1024, 2048, 4096, 8192)
    ]
    cases += [
        attention("relation_kl", (b, h, 512, 64), bf16, importance=4, kind="scaling")
        for b, h in ((1, 12), (8, 12), (32, 12), (8, 4), (8, 16), (8, 32))
    ]
    return cases


def cases_for(device: str) -> list[Case]:
    """All cases of a device type, most important first."""
    cases = _cuda() if device.startswith("cuda") else _cpu()
    return sorted(cases, key=lambda case: case.importance)
