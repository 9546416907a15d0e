"""The CSV as Markdown: what was measured, how it stands to the targets, what is missing and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bertkd.bench.cases import LETTERS
from bertkd.bench.record import SHAPE_COLUMNS, Row
from bertkd.bench.targets import Outcome, outcomes

MEANING = """\
Times are milliseconds, medians with the 20th and 80th percentile over the rounds; `x eager` is the median of the
rounds' own ratios, since contestants take turns. Memory is the peak beyond the inputs (a training step: beyond weights
and optimiser state). Roofline is the share of the least time that the device's own ceilings, measured in the same run,
allow for the bytes, flops and exponentials of the case. Every contestant was compared with float64 (a training step:
with eager) before it was timed; `error` is the largest relative error found."""


def case_name(row: Row) -> str:
    """E.g. ``relation_kl B8 H12 L128 Ds64 Dt64``; the dtype where it is not float32."""
    sizes = [f"{LETTERS[c]}{getattr(row, c)}" for c in SHAPE_COLUMNS if getattr(row, c)]
    extra = [] if row.dtype == "float32" else [row.dtype]
    extra += [] if row.padding == "full" else [f"{row.padding} lengths"]
    return " ".join([row.op, *sizes, *extra])


def markdown(rows: Sequence[Row], facts: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The whole summary of a results folder."""
    first = next(iter(rows), None)
    device = first.device if first else "nothing measured"
    parts = [f"# Benchmarks: {device}", _conditions(rows), MEANING]
    parts += [_targets(rows), _measurements(rows), _ceilings(rows), _missing(rows, facts)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def short_table(rows: Sequence[Row]) -> str:
    """The speed-ups over eager with gradients, for a terminal."""
    found = [r for r in rows if r.metric == "speedup" and r.mode in ("fwd_bwd", "step")]
    if not found:
        return "no speed-up over eager with gradients was measured; the other results are in summary.md"
    times = {(r.case, r.impl, r.mode): r.p50 for r in rows if r.metric == "time"}
    lines = [("case", "impl", "ms", "x eager")]
    for row in found:
        milliseconds = times.get((row.case, row.impl, row.mode))
        lines.append((case_name(row), row.impl, number(milliseconds), number(row.p50)))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def number(value: float | None) -> str:
    """Three significant digits, never in exponents."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"


def _conditions(rows: Iterable[Row]) -> str:
    def distinct(name: str) -> str:
        return ", ".join(sorted({str(getattr(r, name)) for r in rows if getattr(r, name)})) or "-"

    names = ("threads", "torch", "triton", "transformers", "bertkd", "commit", "date")
    return "; ".join(f"{name} {distinct(name)}" for name in names) + "."


def _targets(rows: Sequence[Row]) -> str:
    kind = "gpu" if any(r.device and "cores" not in r.device for r in rows) else "cpu"
    table: list[tuple[str, ...]] = [("target", "wanted", "reached", "by", "reached / wanted")]
    table += map(_target_line, outcomes(rows, kind))
    return "## Targets\n\n" + _table(table)


def _target_line(outcome: Outcome) -> tuple[str, ...]:
    target, reached = outcome.target, outcome.reached
    name = f"{target.op} {target.shape}"
    bound = "at most" if target.metric == "memory" else "at least"
    unit = "" if target.metric == "roofline" else "x"
    what = target.against if target.metric == "time" else f"{target.metric} of {target.against}"
    what = "of the roofline" if target.metric == "roofline" else what
    wanted = f"{bound} {target.factor:g}{unit} {what}"
    if reached is None:
        return (name, wanted, "not measured", outcome.impl, "")
    share = target.factor / reached if target.metric == "memory" else reached / target.factor
    verdict = "" if outcome.met else " **missed**"
    return (name, wanted, f"{number(reached)}{unit}", outcome.impl, f"{number(share)}{verdict}")


def _measurements(rows: Sequence[Row]) -> str:
    sections = []
    for kind, title in (
        ("op", "Losses and attention"),
        ("step", "Training steps"),
        ("scaling", "Scaling"),
    ):
        table = _of_kind([row for row in rows if row.kind == kind])
        if len(table) > 1:
            sections.append(f"## {title}\n\n" + _table(table))
    return "\n\n".join(sections)


def _of_kind(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        (
            "case",
            "mode",
            "impl",
            "ms",
            "x eager",
            "MiB",
            "roofline",
            "tokens/s",
            "largest batch",
            "error",
            "commit",
        )
    ]
    # Said where it is not the same for all: a run replaces the cases that it gets to, and leaves the others.
    commits = {row.commit for row in rows if row.p50 is not None}
    places = {case: place for place, case in enumerate(dict.fromkeys(row.case for row in rows))}
    grouped: dict[tuple[int, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.p50 is not None:
            grouped.setdefault((places[row.case], row.mode, row.impl), {})[row.metric] = row
    for (_, mode, impl), found in sorted(grouped.items(), key=lambda item: item[0][:2]):
        some = next(iter(found.values()))
        share = found.get("roofline")
        medians = {metric: number(row.p50) for metric, row in found.items()}
        table.append(
            (
                case_name(some),
                mode,
                impl,
                _spread(found.get("time")),
                medians.get("speedup", ""),
                medians.get("memory", ""),
                f"{share.p50:.0%} of {share.against}" if share and share.p50 else "",
                medians.get("throughput", ""),
                medians.get("largest_batch", ""),
                f"{some.error:.0e}" if some.error else "",
                some.commit[:7] if len(commits) > 1 else "",
            )
        )
    return _without_empty_columns(table)


def _spread(row: Row | None) -> str:
    if row is None:
        return ""
    if row.p20 is None or row.p80 is None:
        return number(row.p50)
    return f"{number(row.p50)} ({number(row.p20)} to {number(row.p80)})"


def _ceilings(rows: Sequence[Row]) -> str:
    found = [
        f"{number((row.p50 or 0) / 1e9)} G{row.unit} ({row.dtype})"
        for row in rows
        if row.kind == "ceiling"
    ]
    return "Ceilings measured: " + ", ".join(found) + "." if found else ""


def _missing(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.status != "ok":
            key = (row.impl, row.status, row.note)
            reasons[key] = reasons.get(key, 0) + 1
    lines = [
        f"- {impl}: {status}, {note or 'no reason given'} ({count} measurements)"
        for (impl, status, note), count in sorted(reasons.items())
    ]
    why = facts.get("left_out_because", "want of time")
    lines += [f"- left out for {why}: {name}" for name in facts.get("left_out", [])]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def _without_empty_columns(table: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    kept = [i for i in range(len(table[0])) if any(line[i] for line in table[1:])]
    return [tuple(line[i] for i in kept) for line in table]
