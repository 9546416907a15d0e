"""Loss curves, score curves and score bars as PNG files, drawn without a display."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from bertkd.study.files import write_through

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette stays apart under the common colour-vision deficiencies.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

UNITS = {
    "att_kl": "KL per attention row (nats)",
    "val_kl": "KL per relation row (nats)",
    "qkv_kl": "KL per relation row (nats)",
    "kd": "KL per example (nats)",
    "ce": "cross-entropy (nats)",
    "att_mse": "squared score difference",
    "hid_seq": "squared state difference",
    "hid_cls": "squared state difference",
    "hid_cos": "1 - cosine",
    "pool": "1 - cosine",
}

Curve = tuple[Sequence[float], Sequence[float]]


def check_can_draw() -> None:
    """To be asked before a training: its pictures are drawn after it, when hours would be lost.

    Raises:
        ImportError: matplotlib is not installed, or does not fit what is.
    """
    import matplotlib.figure  # noqa: F401 - not at the top: the benchmark's pictures can be left out


def plot_losses(history: Mapping[str, Curve], path: str | Path, title: str) -> Path:
    """One panel per loss term over a shared step axis, logarithmic where all values allow it.

    Args:
        history: term -> (steps, values), e.g. ``{"att_kl": ([1, 2], [0.5, 0.4])}``.
        path: the PNG to write.
        title: heading of the figure.

    Raises:
        ValueError: ``history`` is empty.
    """
    if not history:
        raise ValueError("history is empty: there is no loss to plot.")
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = panels(len(history), max(6.0, 4.2 * len(history)), sharex=True)
    for axis, colour, (term, (steps, values)) in zip(
        axes, _colours(len(history)), history.items(), strict=True
    ):
        axis.plot(steps, values, color=colour, linewidth=1.2)
        if min(values) > 0 and max(values) > 3 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(term, fontsize=11)
        axis.set_ylabel(UNITS.get(term, "loss"))
        axis.set_xlabel("optimiser step")
    return _save(figure, path, title)


def plot_score_curves(
    curves: Mapping[str, Curve],
    path: str | Path,
    title: str,
    *,
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """One panel per score over training, with horizontal lines for what it is held against.

    Args:
        curves: score name -> (steps, values); steps start at 0 for the untrained student.
        path: the PNG to write.
        title: heading of the figure.
        references: score name -> {line label: value}, e.g. ``{"MRR": {"teacher": 0.44}}``.
    """
    if not curves:
        raise ValueError("curves is empty: there is no score to plot.")
    figure, axes = panels(len(curves), max(6.0, 4.2 * len(curves)), sharex=True)
    for axis, colour, (name, (steps, values)) in zip(
        axes, _colours(len(curves)), curves.items(), strict=True
    ):
        axis.plot(steps, values, color=colour, marker="o", markersize=4, label="student")
        lines = (references or {}).get(name, {})
        for style, (label, value) in zip(cycle(("--", ":", "-.")), lines.items(), strict=False):
            axis.axhline(value, color="0.35", linestyle=style, linewidth=1.2, label=label)
        axis.set_title(name, fontsize=11)
        axis.set_ylabel(f"{name} (0 to 1)")
        axis.set_xlabel("optimiser step")
        axis.legend(frameon=False, fontsize=9)
    return _save(figure, path, title)


def plot_score_bars(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    title: str,
) -> Path:
    """Grouped bars: one group per score, one bar per model; mean ± standard deviation over seeds.

    The deviation is that of a sample (n - 1), as in the tables; a single value has no whisker.

    Args:
        scores: model -> {score name: values over seeds}; a model may lack a score.
        path: the PNG to write.
        title: heading of the figure.
    """
    if not scores:
        raise ValueError("scores is empty: there is nothing to plot.")
    names = list(dict.fromkeys(name for by_name in scores.values() for name in by_name))
    bars = len(names) * len(scores)
    figure, (axis,) = panels(1, max(6.0, 0.75 * bars + 2.0))
    width = 0.8 / len(scores)
    for place, (model, by_name) in enumerate(scores.items()):
        present = [name for name in names if by_name.get(name)]
        spots = [names.index(name) + (place - (len(scores) - 1) / 2) * width for name in present]
        means = [statistics.fmean(by_name[name]) for name in present]
        spreads = [
            statistics.stdev(by_name[name]) if len(by_name[name]) > 1 else 0.0 for name in present
        ]
        # Whiskers drawn by bar() push the labels above them.
        drawn = axis.bar(
            spots,
            means,
            width * 0.92,
            color=COLOURS[place % len(COLOURS)],
            label=model,
            yerr=spreads if any(spreads) else None,
            ecolor="0.2",
            capsize=3,
        )
        axis.bar_label(drawn, fmt="%.3f", padding=5, fontsize=9)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("score (0 to 1)")
    axis.margins(y=0.12)
    axis.legend(frameon=False, ncols=len(scores), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _save(figure, path, title)


def panels(count: int, width: float, height: float = 4.0, *, sharex: bool = False, grid: str = "y"):
    """A figure of ``count`` panels in a row, with lines along the axes of ``grid``: "x", "y" or "both"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, sharex=sharex, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis=grid, color="0.9")
        axis.set_axisbelow(True)
    return figure, list(axes)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _save(figure: Figure, path: str | Path, title: str) -> Path:
    figure.suptitle(title, fontsize=12)
    return write_through(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
