"""One measurement is one row: the CSV's columns, and reading and writing it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bertkd.ops.implementations import IMPLS
from bertkd.study.files import write_text

SHAPE_COLUMNS = (
    "batch",
    "heads",
    "length",
    "width_s",
    "width_t",
    "rows",
    "classes",
    "layers",
    "processes",
)
# What makes a later measurement replace an earlier one.
GROUP_COLUMNS = ("kind", "op", "impl", *SHAPE_COLUMNS, "dtype", "padding", "mode", "device")

# ok: measured. unavailable: not installed, or cannot run this case. red: verified and found wrong, so never timed.
# oom: out of memory. error: it raised.
STATUSES = ("ok", "unavailable", "red", "oom", "error")


@dataclass(frozen=True)
class Row:
    """A measurement, or the reason why there is none.

    Attributes:
        kind: "op", "step", "scaling" or "ceiling".
        op, impl: what ran, and which contestant ran it.
        batch ... processes: the shape; 0 where a column does not apply.
        dtype, padding: of the inputs; padding is "full" or "glue".
        mode: "fwd", "fwd_bwd" or "step".
        metric: "time", "speedup", "memory", "roofline", "throughput", "largest_batch", "rate".
        p20, p50, p80: percentiles over the rounds; None without a measurement.
        unit: "ms", "x", "MiB", "share", "tokens/s", "sequences", "bytes/s", "flops/s", "exps/s".
        against: what a "speedup" is relative to, or the resource that binds a "roofline".
        rounds: timed rounds.
        error: largest relative error against float64 when it was verified.
        status, note: see ``STATUSES``, and the reason in words.
    """

    kind: str
    op: str
    impl: str
    batch: int = 0
    heads: int = 0
    length: int = 0
    width_s: int = 0
    width_t: int = 0
    rows: int = 0
    classes: int = 0
    layers: int = 0
    processes: int = 0
    dtype: str = ""
    padding: str = "full"
    mode: str = ""
    metric: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    unit: str = ""
    against: str = ""
    rounds: int = 0
    error: float | None = None
    status: str = "ok"
    note: str = ""
    device: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    bertkd: str = ""
    commit: str = ""
    date: str = ""

    @property
    def group(self) -> tuple[str, ...]:
        """What was measured, whatever the metric and whenever it was."""
        return tuple(str(getattr(self, name)) for name in GROUP_COLUMNS)

    @property
    def case(self) -> tuple[str, ...]:
        """The case it belongs to, whoever took part."""
        return tuple(str(getattr(self, n)) for n in GROUP_COLUMNS if n not in ("impl", "mode"))


COLUMNS = tuple(field.name for field in fields(Row))
_INTEGERS = {*SHAPE_COLUMNS, "rounds", "threads"}
_FLOATS = {"p20", "p50", "p80", "error"}


def write_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write the CSV file atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _written(value) for name, value in asdict(row).items()})
    return write_text(path, text.getvalue())


def read_rows(path: str | Path) -> list[Row]:
    """Read a CSV file that ``write_rows`` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has other columns, or a line that is none of them; says which.
    """
    with Path(path).open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}, not those of this version; measure again "
                "into a new folder."
            )
        rows = []
        for cells in reader:
            try:
                rows.append(_row(cells))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        return rows


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows; a new measurement of a contestant in a case and mode takes the place of all old rows of it.

    A case that failed as a whole has one row, of contestant "*": the case's next measurement removes it, and it removes
    nothing that was measured before. Neither does a rival that is not installed this time; and a new time does not
    remove the largest batch, which is searched for later.
    """
    old = list(old)
    measured = {row.group for row in old if row.p50 is not None and row.impl not in IMPLS}
    fresh = [row for row in new if row.status != "unavailable" or row.group not in measured]
    replaced = {row.group for row in fresh}
    cases = {row.case for row in fresh}
    # Unless it has been searched for again, or belongs to what is known to be wrong or to fail by now.
    filled = {row.group for row in fresh if row.metric == "largest_batch" or row.status != "ok"}
    kept = (
        row
        for row in old
        if (
            row.group not in replaced or (row.metric == "largest_batch" and row.group not in filled)
        )
        and not (row.impl == "*" and row.case in cases)
    )
    return [*kept, *fresh]


def _row(cells: dict[str, str]) -> Row:
    values: dict[str, Any] = {name: _parsed(name, text) for name, text in cells.items()}
    return Row(**values)


def _written(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _parsed(name: str, text: str) -> object:
    if name in _INTEGERS:
        return int(text)
    if name in _FLOATS:
        return float(text) if text else None
    return text
