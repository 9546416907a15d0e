"""The README's figures, written from the committed CSV between two markers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bertkd.bench.environment import slug_of
from bertkd.bench.record import Row, read_rows
from bertkd.bench.spec import OURS
from bertkd.bench.summary import number
from bertkd.study.files import write_text

BEGIN = "<!-- measured:begin (written by `python -m bertkd.bench readme`, do not edit) -->"
END = "<!-- measured:end -->"

OPS = (
    "relation_kl",
    "window_relation_kl",
    "self_relation_kl",
    "attention_mse",
    "softmax_kl",
    "linear_kl",
)
ATTENTION = ("self_attention", "window_self_attention")
SDPA = ("sdpa", "native")  # who attends, in the table of the networks' own attention


def block(rows: Sequence[Row]) -> str:
    """The text between the markers: the CPU and the GPU measured last, and where the others' figures are.

    Raises:
        ValueError: there is no speed-up among the rows.
    """
    devices: dict[str, list[Row]] = {}
    for row in rows:
        devices.setdefault(row.device, []).append(row)
    measured = [own for own in devices.values() if any(r.metric == "speedup" for r in own)]
    if not measured:
        raise ValueError("the results hold no speed-up; run `make bench` first.")
    measured.sort(key=lambda own: max(r.date for r in own), reverse=True)
    parts, others = [], []
    for kind in (True, False):
        own = [device for device in measured if _is_cpu(device) is kind]
        parts += [_of_device(device) for device in own[:1]]
        others += [device[0].device for device in own[1:]]
    if others:
        links = (f"[{name}](benchmarks/results/{slug_of(name)}/summary.md)" for name in others)
        parts.append("Measured too: " + ", ".join(links) + ".")
    return "\n\n".join(parts)


def _is_cpu(rows: Sequence[Row]) -> bool:
    return any(r.impl == "native" and r.metric == "speedup" for r in rows)


def _of_device(rows: Sequence[Row]) -> str:
    some = next(row for row in rows if row.metric == "speedup")
    impls = [i for i in OURS if any(r.impl == i and r.metric == "speedup" for r in rows)]
    ops = [r for r in rows if r.kind == "op" and r.mode == "fwd_bwd" and r.op in OPS]
    steps = [r for r in rows if r.kind == "step"]
    torch = some.torch.partition("+")[0]
    commits = ", ".join(dict.fromkeys(row.commit or "-" for row in [*ops, *steps]))
    head = (
        f"On {some.device}, {some.threads} threads, torch {torch} (commit {commits}): median\n"
        "time, gain, and peak memory beyond the inputs (of a step: beyond weights and optimiser state):"
    )
    lines = [_line("loss, forward and backward", impls), "|---|---|" + "---|" * len(impls)]
    lines += _body(ops, impls)
    attention = [r for r in rows if r.kind == "op" and r.mode == "fwd_bwd" and r.op in ATTENTION]
    for what, part, own in (
        ("the networks' attention", attention, SDPA),
        ("whole training step", steps, impls),
    ):
        if part:
            lines += ["", _line(what, own), "|---|---|" + "---|" * len(own)]
            lines += _body(part, own)
    return head + "\n\n" + "\n".join(lines)


def _line(first: str, impls: Sequence[str]) -> str:
    return "| " + " | ".join([first, "PyTorch eager", *impls]) + " |"


def _body(rows: Sequence[Row], impls: Sequence[str]) -> list[str]:
    """One line a case: eager's time and memory, then each implementation's, with its gain."""
    lines = []
    for name in dict.fromkeys(_name(row) for row in rows):
        mine = {(r.impl, r.metric): r.p50 for r in rows if _name(r) == name and r.p50 is not None}
        if ("eager", "time") not in mine:
            continue
        cells = [name]
        for impl in ("eager", *impls):
            time, gain, peak = (mine.get((impl, m)) for m in ("time", "speedup", "memory"))
            parts = [] if time is None else [f"{number(time)} ms"]
            parts += [] if gain is None else [f"{gain:.1f}x"]
            parts += [] if peak is None else [f"{number(peak)} MiB"]
            cells.append(", ".join(parts))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _name(row: Row) -> str:
    if row.kind == "step":
        return f"{row.op.replace('_', ' ')}, B {row.batch}, L {row.length}{_rest(row)}"
    if row.classes:
        return f"`{row.op}` N {row.rows}, V {row.classes}{_rest(row)}"
    sizes = (row.batch, row.heads, row.length, row.width_s)
    return f"`{row.op}` {sizes}{_rest(row)}"


def _rest(row: Row) -> str:
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return dtype + ("" if row.padding == "full" else ", GLUE-like lengths")


def replace(text: str, new: str) -> str:
    """``text`` with ``new`` between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def committed_rows(root: Path) -> list[Row]:
    """Rows of all results folders of a checkout."""
    paths = sorted((root / "benchmarks" / "results").glob("*/results.csv"))
    return [row for path in paths for row in read_rows(path)]


def main(words: Sequence[str]) -> int:
    """Write the block, or with ``--check`` say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m bertkd.bench readme", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is outdated")
    check = parser.parse_args(words).check
    root = Path(__file__).resolve().parents[2]
    path = root / "README.md"
    old = path.read_text(encoding="utf-8")
    new = replace(old, block(committed_rows(root)))
    if check:
        if new != old:
            print("README.md differs from benchmarks/results; run `python -m bertkd.bench readme`")
        return int(new != old)
    write_text(path, new)
    return 0
