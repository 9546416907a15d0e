"""The topic study's outcome, whichever way it falls, as table, plot and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import bertkd
from bertkd.study.files import write_json, write_text
from bertkd.study.plots import plot_score_bars
from bertkd.study.table import Table, human_time, mean_std
from bertkd.study.workload import Scores, Workload

# A teacher whose last third of updates brings more than this still learns.
PLATEAU_POINTS = 2.0


@dataclass(frozen=True)
class Run:
    """One training of the study.

    Attributes:
        method: ``"teacher"`` or how the student was trained.
        seed: of it.
        scores: split -> score name -> value.
        steps: updates made; fewer than planned where it stopped early.
        seconds: training and scoring.
        curve: ``(update, validation score)`` of each evaluation, by the task's deciding metric.
    """

    method: str
    seed: int
    scores: Scores
    steps: int
    seconds: float
    curve: list[tuple[int, float]]


def write_report(
    output_dir: Path, workload: Workload, runs: Sequence[Run], failed: Sequence[str] = ()
) -> None:
    """``results.json``, ``report.md`` and ``bars.png``; prints the table and what it means.

    Args:
        output_dir: gets the files.
        workload: what was trained on.
        runs: the teacher's and the students' that came to an end.
        failed: the others, each with its error.
    """
    by_method = group(runs)
    table = method_table(by_method, workload.metric)
    found = findings(by_method, workload.metric, len(workload.task.test))
    notes = [*found, *(f"FAILED: {failure}" for failure in failed)]
    seeds = len({run.seed for run in runs if run.method != "teacher"})
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    title = f"{workload.name}: {spread}"
    size = (
        f"{len(workload.train):,} training rows, {workload.task.num_labels} classes; scores on the test "
        "split, weights chosen on the validation split."
    )
    print(f"\n{title}\n{size}\n\n{table.text()}\n")
    print("\n".join(notes))
    report = [f"# {title}", size, table.markdown(), "\n".join(f"- {note}" for note in notes)]
    write_text(output_dir / "report.md", "\n\n".join(report) + "\n")
    write_json(
        output_dir / "results.json",
        {
            "task": workload.name,
            "runs": [asdict(run) for run in runs],
            "findings": notes,
            "failed": list(failed),
            "bertkd": bertkd.__version__,
        },
    )
    bars = {
        method: {f"test {workload.metric}": [run.scores["test"][workload.metric] for run in found]}
        for method, found in by_method.items()
    }
    plot_score_bars(bars, output_dir / "bars.png", title)


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by method, in order of first appearance."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return by_method


def method_table(by_method: dict[str, list[Run]], metric: str) -> Table:
    """One row per method: every test score, the validation ``metric``, updates and time."""
    first = next(iter(by_method.values()))[0]
    names = list(first.scores["test"])
    table = Table(
        ["method", "runs", *(f"test {n}" for n in names), f"validation {metric}", "updates", "time"]
    )
    for method, runs in by_method.items():
        table.add(
            method,
            str(len(runs)),
            *(mean_std([run.scores["test"][name] for run in runs]) for name in names),
            mean_std([run.scores["validation"][metric] for run in runs]),
            f"{fmean(run.steps for run in runs):.0f}",
            human_time(fmean(run.seconds for run in runs)),
        )
    return table


def findings(by_method: dict[str, list[Run]], metric: str, test_rows: int) -> list[str]:
    """The teacher's plateau; each distilled method against labels only, seed by seed, and the teacher; chance."""
    (lesson,) = by_method["teacher"]
    teacher = lesson.scores["test"][metric]
    plain = {run.seed: run.scores for run in by_method.get("labels only", [])}
    notes = [_plateau(lesson, metric)]
    for method, runs in by_method.items():
        if method == "teacher":
            continue
        values = [run.scores["test"][metric] for run in runs]
        # A seed whose label-only student failed has nothing to be compared with.
        pairs = [(run.scores, plain[run.seed]) for run in runs if run.seed in plain]
        if method != "labels only" and pairs:
            gains, seen = (
                [100 * (ours[split][metric] - theirs[split][metric]) for ours, theirs in pairs]
                for split in ("test", "validation")
            )
            better = sum(gain > 0 for gain in gains)
            notes.append(
                f"{method}: {mean_std(gains, 1)} points of {metric} over labels only, better in {better} "
                f"of {len(gains)} seeds; on the validation split {mean_std(seen, 1)}."
            )
        if fmean(values) > teacher:
            notes.append(
                f"WARNING: {method} ({fmean(values):.3f}) overtakes the teacher ({teacher:.3f}): train the "
                "teacher longer before concluding anything."
            )
    if metric == "accuracy":
        notes.append(_chance(teacher, test_rows))
    return notes


def _chance(accuracy: float, rows: int) -> str:
    """What the seeds' spread does not show, as they share their rows."""
    points = 100 * math.sqrt(accuracy * (1 - accuracy) / rows)
    return (
        f"All seeds share {rows:,} test rows, which give an accuracy of {accuracy:.3f} a standard error of "
        f"{points:.1f} points; the ± of the seeds does not include it."
    )


def _plateau(teacher: Run, metric: str) -> str:
    """What the last third of the teacher's updates still brought on the validation split."""
    best_at, best = max(teacher.curve, key=lambda point: point[1])
    early = [score for step, score in teacher.curve if step <= teacher.steps * 2 / 3]
    gain = 100 * (best - max(early, default=0.0))
    note = (
        f"teacher: best validation {metric} {best:.3f} at update {best_at} of {teacher.steps}; the last third "
        f"of its updates brought {gain:.1f} points."
    )
    if gain > PLATEAU_POINTS:
        return f"WARNING: {note} It is not at its plateau: raise teacher_steps."
    return note
