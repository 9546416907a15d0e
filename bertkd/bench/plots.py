"""The CSV as pictures: time and memory over length, share of the roofline, throughput of training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertkd.bench.record import Row
from bertkd.bench.summary import case_name
from bertkd.study.files import write_through
from bertkd.study.plots import COLOURS, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour and marker per contestant in every picture.
_ORDER = (
    "eager",
    "chunked",
    "native",
    "triton",
    "compile",
    "cuda",
    "flex",
    "sdpa",
    "textbrewer",
    "liger",
    "linearard",
    "products",
)
_MARKERS = "osD^vPXp<>*h"
_PALETTE = (*COLOURS, "#7F7F7F", "#DDCC77", "#882255", "#44AA99", "#000000", "#999933")


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures that the rows suffice for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib  # noqa: F401 - asked for here so that its absence is one error, not one per picture

    drawn = [
        _over_length(rows, folder / "length.png"),
        _roofline(rows, folder / "roofline.png"),
        _throughput(rows, folder / "steps.png"),
    ]
    return [path for path in drawn if path is not None]


def _over_length(rows: Sequence[Row], path: Path) -> Path | None:
    """Time and memory of relation_kl at a constant number of tokens."""
    sweep = [
        r for r in rows if r.kind == "scaling" and r.op == "relation_kl" and r.mode == "fwd_bwd"
    ]
    by_tokens: dict[int, set[int]] = {}
    for row in sweep:
        by_tokens.setdefault(row.batch * row.length * row.heads, set()).add(row.length)
    if not by_tokens:
        return None
    tokens = max(by_tokens, key=lambda count: len(by_tokens[count]))
    lengths = by_tokens[tokens]
    if len(lengths) < 2:
        return None
    kept = [r for r in sweep if r.batch * r.length * r.heads == tokens and r.p50 is not None]
    if not kept:
        return None
    figure, axes = panels(2, 10.0, 4.2, grid="both")
    for axis, metric, label in zip(axes, ("time", "memory"), ("ms", "MiB"), strict=True):
        for impl in _present(kept, metric):
            points = sorted((r.length, r) for r in kept if (r.impl, r.metric) == (impl, metric))
            x, y = [p[0] for p in points], [p[1].p50 for p in points]
            axis.plot(x, y, label=impl, **_style(impl))
            if metric == "time":
                low, high = [p[1].p20 for p in points], [p[1].p80 for p in points]
                axis.fill_between(
                    x, low, high, color=_style(impl)["color"], alpha=0.15, linewidth=0
                )
        _log_lengths(axis, sorted(lengths))
        axis.set_title(f"{metric}, forward and backward")
        axis.set_ylabel(label)
    _legend(figure, axes[0])
    some = kept[0]
    title = f"relation_kl, {tokens // some.heads} tokens a batch, H {some.heads}, D {some.width_s}, {some.dtype}"
    return _save(figure, path, f"{title}\n{some.device}")


def _roofline(rows: Sequence[Row], path: Path) -> Path | None:
    """Share of the least possible time, one group of bars a case."""
    kept = [
        r
        for r in rows
        if r.metric == "roofline" and r.kind == "op" and r.mode == "fwd_bwd" and r.p50
    ]
    if not kept:
        return None
    names = list(dict.fromkeys(case_name(r) for r in kept))
    figure, (axis,) = panels(1, 9.0, 1.2 + 0.62 * len(names), grid="both")
    _bars(axis, kept, names, unit=0.01)
    axis.margins(y=0.01)
    axis.axvline(100, color="0.35", linestyle="--", linewidth=1)
    axis.set_xlabel("% of the roofline (100: as fast as the device's ceilings allow)")
    _legend(figure, axis)
    return _save(figure, path, f"Share of the roofline, forward and backward\n{kept[0].device}")


def _throughput(rows: Sequence[Row], path: Path) -> Path | None:
    """Tokens per second of whole training steps."""
    kept = [r for r in rows if r.metric == "throughput" and r.kind == "step" and r.p50]
    if not kept:
        return None
    names = list(dict.fromkeys(case_name(r) for r in kept))
    figure, (axis,) = panels(1, 9.0, 1.4 + 0.7 * len(names), grid="both")
    for bars in _bars(axis, kept, names):
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axis.margins(x=0.12)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("real tokens per second")
    _legend(figure, axis)
    return _save(figure, path, f"Training steps\n{kept[0].device}")


def _bars(axis: Axes, rows: Sequence[Row], names: Sequence[str], unit: float = 1.0) -> list[Any]:
    """Medians of one metric in ``unit``, from the top a group of bars for each case, a bar for each contestant."""
    drawn = []
    impls = _present(rows, rows[0].metric)
    thick = 0.8 / len(impls)
    for place, impl in enumerate(impls):
        found = {case_name(r): (r.p50 or 0) / unit for r in rows if r.impl == impl}
        spots = [
            i + (place - (len(impls) - 1) / 2) * thick for i, n in enumerate(names) if n in found
        ]
        values = [found[n] for n in names if n in found]
        bars = axis.barh(spots, values, thick * 0.92, color=_style(impl)["color"], label=impl)
        drawn.append(bars)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    return drawn


def _present(rows: Sequence[Row], metric: str) -> list[str]:
    found = {r.impl for r in rows if r.metric == metric and r.p50 is not None}
    return [impl for impl in _ORDER if impl in found] + sorted(found - set(_ORDER))


def _style(impl: str) -> dict[str, Any]:
    place = _ORDER.index(impl) if impl in _ORDER else len(_ORDER) - 1
    return {
        "color": _PALETTE[place],
        "marker": _MARKERS[place],
        "linestyle": "-" if place < len(COLOURS) else "--",
        "markersize": 5,
    }


def _legend(figure: Any, axis: Axes) -> None:
    """Below the panels, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(len(labels), 7)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _log_lengths(axis: Axes, lengths: list[int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("length L")


def _save(figure: Any, path: Path, title: str) -> Path:
    figure.suptitle(title, fontsize=11)
    return write_through(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
