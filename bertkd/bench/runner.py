"""One run: choose the cases, measure them within the time there is, write the results."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bertkd.bench import environment, step_fill, summary
from bertkd.bench.cases import Case, cases_for
from bertkd.bench.children import end_with_parent
from bertkd.bench.commandline import Options
from bertkd.bench.contestants import IMPLS, MODES, OURS, applies
from bertkd.bench.ddp import ddp_cases_for, run_ddp
from bertkd.bench.op_cases import Settings, run_case
from bertkd.bench.record import Row, merge, read_rows, write_rows
from bertkd.bench.roofline import MeasuredCeilings
from bertkd.bench.selection import Selection, known_values, parse_selection
from bertkd.bench.step_cases import step_cases_for
from bertkd.bench.step_models import PAIRS
from bertkd.bench.step_runs import CONTESTANTS, run_step
from bertkd.bench.timing import DeviceLost, check_device, release_memory, told
from bertkd.study.files import held_output_dir, write_json, write_text

RESULTS, ENVIRONMENT, SUMMARY = "results.csv", "environment.json", "summary.md"


@dataclass(frozen=True)
class Job:
    """A checked run: nothing of it can be wrong any more but what is measured."""

    options: Options
    device: torch.device
    selection: Selection
    cases: Sequence[Case]
    output_dir: Path


def plan(options: Options) -> Job:
    """Check everything that can be wrong, before anything runs or is written.

    Raises:
        ValueError: a device that is not there, a number that makes no sense, a selection of nothing.
    """
    device = environment.find_device(options.device)
    if options.rounds < 3:
        raise ValueError(f"rounds must be at least 3 for a median, got {options.rounds}.")
    for name in ("seconds", "budget_minutes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}.")
    if options.output_dir == "":
        raise ValueError("output_dir is empty; name a folder, or leave it out.")
    cases = all_cases(device.type)
    selection = parse_selection(
        options.select, known_values(cases, impl=IMPLS, mode=(*MODES, "step"))
    )
    chosen = [case for case in cases if selection.takes(case) and _has_anybody(case, selection)]
    if not chosen:
        raise ValueError(f"select={options.select!r} leaves no case; see them with --list.")
    return Job(options, device, selection, chosen, output_folder(options.output_dir, device))


def _has_anybody(case: Case, selection: Selection) -> bool:
    """Whether a contestant and a mode of the case are asked for; else eager would be timed and not reported."""
    return bool(asked_for(case, selection, CONTESTANTS if case.op in PAIRS else IMPLS))


def asked_for(case: Case, selection: Selection, impls: Sequence[str]) -> list[tuple[str, str]]:
    """Contestants among ``impls`` that a case has and a selection allows, each with a mode."""
    is_step = case.op in PAIRS
    return [
        (impl, mode)
        for impl in impls
        for mode in (("step",) if is_step else MODES)
        if selection.allows("impl", impl) and selection.allows("mode", mode)
        if is_step or applies(impl, case.op, mode)
    ]


def all_cases(device: str) -> list[Case]:
    """Ops, training steps and scaling of a device type, the most important first."""
    cases = [*cases_for(device), *step_cases_for(device), *ddp_cases_for(device)]
    return sorted(cases, key=lambda case: case.importance)


def output_folder(path: str | None, device: torch.device) -> Path:
    """Where results go: as told, or to this device's folder of the committed results in a checkout."""
    if path is not None:
        return Path(path)
    in_checkout = Path("bertkd", "bench").is_dir() and Path("benchmarks").is_dir()
    parent = Path("benchmarks", "results") if in_checkout else Path("bench")
    return parent / environment.slug_of(environment.device_name(device))


# A log that is read while it grows, or after a kill, must not stay in a buffer.
SAY = partial(print, flush=True)


def run(job: Job, say: Callable[[str], object] = SAY, *, apart: bool = False) -> list[Row]:
    """Measure, write CSV, environment, summary and plots, and say the short table last.

    A GPU that fails for good ends the run: what was not started is named, and no later case is blamed for it.

    Args:
        apart: on a CPU, measure each case in a process of its own.

    Raises:
        ValueError: the folder holds results of another device, or another run measures into it.
    """
    if job.device.index is not None:
        torch.cuda.set_device(job.device)
    with held_output_dir(job.output_dir, "bench") as folder:
        return _run(job, folder, say, apart)


def _run(job: Job, folder: Path, say: Callable[[str], object], apart: bool) -> list[Row]:
    path = folder / RESULTS
    before = read_rows(path) if path.exists() else []
    rows: list[Row] = []
    lost = ""
    stamp = environment.stamp(job.device)
    # Targets and pictures would take one device's times for the other's.
    if others := {row.device for row in before} - {stamp["device"]}:
        raise ValueError(
            f"output_dir={str(folder)!r} holds results of {', '.join(sorted(others))}, and this is "
            f"{stamp['device']}; name another folder."
        )
    ceilings = MeasuredCeilings(job.device)
    settings = settings_of(job, stamp, ceilings)
    on_cpu = job.device.type == "cpu"
    tasks = _tasks(job.cases, settings, rows, measured_apart if apart and on_cpu else measured)
    facts = environment.describe(job.device)
    waiting = [name for name, _ in tasks]
    earlier = _left_out_before(folder, waiting, before)
    say(
        f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}; {len(job.cases)} cases"
    )
    _note(folder, facts, [*earlier, *waiting], "the run was cut off")
    started = time.perf_counter()
    for number, (name, task) in enumerate(tasks, 1):
        spent = (time.perf_counter() - started) / 60
        late = job.options.budget_minutes is not None and spent >= job.options.budget_minutes
        if late or lost:
            break
        say(f"[{number}/{len(tasks)}] {name}  ({spent:.1f} min)")
        try:
            found = list(task())
        except KeyboardInterrupt:
            if rows:
                say(f"interrupted; the {number - 1} cases before this one are kept in {path}")
            raise
        rows += found
        del waiting[0]
        # After every case, so that a killed run loses one case only.
        write_rows(path, merge(before, [*rows, *ceiling_rows(ceilings, stamp)]))
        _note(folder, facts, [*earlier, *waiting], "the run was cut off")
        if any(row.status == "error" for row in found):
            try:
                check_device(job.device)
            except DeviceLost as reason:
                lost = str(reason)
    facts["minutes"] = round((time.perf_counter() - started) / 60, 2)
    facts["clocks_after"] = "" if on_cpu else environment.clocks()
    why = lost or "want of time"
    _note(folder, facts, [*earlier, *waiting], why)
    if waiting:
        say(f"left out for {why} ({len(waiting)}): " + "; ".join(waiting))
    say(report(folder, plots=job.options.plots, new=rows))
    return rows


def _tasks(
    cases: Sequence[Case],
    settings: Settings,
    rows: Sequence[Row],
    measure: Callable[[Case, Settings], Iterable[Row]],
) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """What there is to do, with names: the cases, then the searches for the largest batches, which break the most.

    Args:
        rows: what the tasks before have found, by the time that one is run.
    """
    fills = settings.fill and settings.selection.allows("mode", "step")
    filled = [case for case in cases if fills and step_fill.is_filled(case, settings.device)]
    return [
        *((_task_name(case), partial(measure, case, settings)) for case in cases),
        *((f"largest batch of {x.name}", partial(_fill, x, settings, rows)) for x in filled),
    ]


def _task_name(case: Case) -> str:
    """The case's name, told apart from that of a sweep that has the same case among others."""
    return case.name + (" (scaling)" if case.kind == "scaling" else "")


def _fill(case: Case, settings: Settings, rows: Sequence[Row]) -> Iterator[Row]:
    try:
        yield from step_fill.fill(case, step_fill.contestants(case, rows, settings), settings)
    except DeviceLost as failure:
        yield _failed(case, settings, failure)


def _left_out_before(folder: Path, tasks: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """What earlier runs into this folder left out, of which nothing has been measured since, or is about to be."""
    path = folder / ENVIRONMENT
    if not path.exists():
        return []
    names = json.loads(path.read_text(encoding="utf-8")).get("left_out", [])
    measured = {_task_name(Case.of(row)) for row in rows if row.p50 is not None}
    return [name for name in names if name not in tasks and name not in measured]


def _note(folder: Path, facts: dict[str, Any], left_out: list[str], why: str) -> None:
    facts["left_out"], facts["left_out_because"] = left_out, why
    write_json(folder / ENVIRONMENT, facts)


def run_apart(job: Job) -> None:
    """``run`` with its cases apart, as the commands do.

    Raises:
        ValueError: a result of bertkd's was wrong or failed, or a case did as a whole; all is written by then.
    """
    failed = [
        row
        for row in run(job, apart=True)
        if row.status in ("red", "error") and row.impl in (*OURS, "*")
    ]
    if failed:
        first = failed[0]
        raise ValueError(
            f"{len(failed)} measurements failed or were wrong, {SUMMARY} lists them; the first: "
            f"{summary.case_name(first)}, {first.impl}: {first.note or first.status}"
        )


def report(folder: Path, *, plots: bool = True, new: Sequence[Row] | None = None) -> str:
    """Write summary and plots of a results folder from its CSV; return the short table.

    Raises:
        FileNotFoundError: the folder holds no results.
    """
    rows = read_rows(folder / RESULTS)
    facts: dict[str, Any] = {}
    if (folder / ENVIRONMENT).exists():
        facts = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    pictures: list[str] = []
    note = ""
    if plots:
        try:
            from bertkd.bench.plots import draw_all

            pictures = [path.name for path in draw_all(rows, folder)]
        except ImportError as missing:
            note = f"\nno plots: {missing}"
    write_text(folder / SUMMARY, summary.markdown(rows, facts, pictures))
    return summary.short_table(rows if new is None else new) + note + f"\nresults in {folder}"


def settings_of(job: Job, stamp: dict[str, Any], ceilings: MeasuredCeilings) -> Settings:
    """How the cases are to be measured."""
    return Settings(
        device=job.device,
        selection=job.selection,
        impls=IMPLS,
        rounds=job.options.rounds,
        seconds=job.options.seconds,
        weigh=job.options.memory,
        fill=job.options.largest_batch,
        stamp=stamp,
        ceilings=ceilings,
    )


def measured(case: Case, settings: Settings) -> Iterator[Row]:
    """Rows of any case; one that fails as a whole gives one row that says why."""
    try:
        release_memory()
        if case.processes:
            yield from run_ddp(case, settings)
        elif case.op in PAIRS:
            yield from run_step(case, settings)
        else:
            yield from run_case(case, settings)
    except Exception as failure:  # whatever it is, the cases after it go on
        yield _failed(case, settings, failure)


def measured_apart(case: Case, settings: Settings) -> list[Row]:
    """``measured`` in a fresh process.

    Whether the maps of eager PyTorch cost page faults (half of its time) depends on the holes that earlier cases
    left in the heap; in a fresh process every case finds what a user's program finds.
    """
    context = multiprocessing.get_context("spawn")
    try:
        if settings.ceilings is not None:
            settings.ceilings(case.dtype)  # once for all cases
        with ProcessPoolExecutor(1, context, initializer=end_with_parent) as pool:
            return pool.submit(_rows_of, case, settings, torch.get_num_threads()).result()
    except Exception as failure:  # the process died, or its answer cannot be sent
        return [_failed(case, settings, failure)]


def _rows_of(case: Case, settings: Settings, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    return list(measured(case, settings))


def _failed(case: Case, settings: Settings, failure: Exception) -> Row:
    found = told(failure)
    if isinstance(failure, ModuleNotFoundError):
        found["status"] = "unavailable"
    return Row(**case.columns, impl="*", metric="time", **found, **settings.stamp)


def ceiling_rows(ceilings: MeasuredCeilings, stamp: dict[str, Any]) -> list[Row]:
    """What the roofline was taken from, for the dtypes that were used."""
    return [
        Row(
            "ceiling",
            name,
            "device",
            dtype=dtype,
            metric="rate",
            p50=value,
            unit=f"{name}/s",
            **stamp,
        )
        for dtype, found in ceilings.found.items()
        for name, value in found._asdict().items()
        if math.isfinite(value)
    ]
