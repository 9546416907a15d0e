"""Is this tree slower than a commit? Case by case, in processes of their own that take turns."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bertkd._locks import LOCK, InUseError, locked
from bertkd.bench.cases import Case
from bertkd.bench.children import pack
from bertkd.bench.contestants import MODES, OURS
from bertkd.bench.environment import find_device
from bertkd.bench.runner import all_cases, asked_for
from bertkd.bench.selection import known_values, parse_selection
from bertkd.bench.summary import number
from bertkd.bench.timing import spread

THRESHOLD = 0.10
# Without a selection: the main case of each op, as training runs it.
DEFAULT = "kind=op,mode=fwd_bwd"
# Of the folder with the base's work tree.
PREFIX = "bertkd-base-"

# The library comes from the tree under test, this package from here: both trees are timed by the same code.
BOOTSTRAP = """
import importlib.util, sys
tree, bench, job = sys.argv[1:4]
sys.path.insert(0, tree)
import bertkd
spec = importlib.util.spec_from_file_location(
    "bertkd.bench", bench + "/__init__.py", submodule_search_locations=[bench])
module = importlib.util.module_from_spec(spec)
sys.modules["bertkd.bench"] = bertkd.bench = module
spec.loader.exec_module(module)
from bertkd.bench.compare_child import work
work(tree, job)
"""


class Verdict(NamedTuple):
    """``ratio`` is new time / base time; ``noise`` what such a ratio varies by on its own."""

    ratio: float
    noise: float
    word: str


def judge(base: Sequence[float], new: Sequence[float], threshold: float = THRESHOLD) -> Verdict:
    """Compare the times of paired processes.

    Args:
        base, new: seconds, one a process, measured in turn.
        threshold: slowdown that is allowed.

    Returns:
        The median of the pairs' ratios; the noise, from half the distance of the 20th to the 80th percentile of
        either side; "slower" or "faster" where the ratio is beyond threshold and noise together, "unclear" where it
        is beyond the threshold but within the noise, else "same".
    """
    ratio = statistics.median(n / b for b, n in zip(base, new, strict=True))
    noise = math.hypot(_half_spread(base), _half_spread(new))
    if ratio > 1 + threshold + noise:
        return Verdict(ratio, noise, "slower")
    if ratio > 1 + threshold:
        return Verdict(ratio, noise, "unclear")
    if 1 / ratio > 1 + threshold + noise:
        return Verdict(ratio, noise, "faster")
    return Verdict(ratio, noise, "same")


def _half_spread(values: Sequence[float]) -> float:
    low, middle, high = spread(values)
    return (high - low) / 2 / middle


def main(words: Sequence[str]) -> int:
    """Run the comparison; 1 if anything became slower, wrong or impossible, or nothing was compared, else 0.

    Raises:
        ValueError: no such commit, no git checkout, or a selection of nothing.
    """
    parser = argparse.ArgumentParser(prog="python -m bertkd.bench compare", allow_abbrev=False)
    parser.add_argument("--base", required=True, help="commit to compare this tree with")
    parser.add_argument("--select", default=DEFAULT, help="as for the benchmark")
    parser.add_argument("--pairs", type=int, default=5, help="processes of either side a case")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds a process")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    args = parser.parse_args(words)
    args.device = str(find_device(args.device))
    for name in ("pairs", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}.")
    root = Path(__file__).resolve().parents[2]
    cases = all_cases(args.device.partition(":")[0])
    selection = parse_selection(args.select, known_values(cases, impl=OURS, mode=(*MODES, "step")))
    jobs = [
        (case, impl, mode)
        for case in cases
        if selection.takes(case) and not case.processes
        for impl, mode in asked_for(case, selection, OURS)
    ]
    if not jobs:
        raise ValueError(f"select={args.select!r} leaves nothing to compare.")
    with checkout(root, args.base) as base_tree:
        return _compare(jobs, base_tree, root, args)


def _compare(jobs: Sequence[tuple[Case, str, str]], base_tree: Path, root: Path, args) -> int:
    failed = compared = 0
    print(f"new / base {args.base}, {args.pairs} pairs of processes, {args.rounds} rounds each")
    for case, impl, mode in jobs:
        timer = Timer(case, impl, mode, args.rounds, args.device)
        name = f"{case.name} {impl} {mode}"
        try:
            base, new = timer.pairs(base_tree, root, args.pairs)
        except Unavailable as reason:
            failed += reason.red
            print(f"  {'red' if reason.red else 'skipped':8} {name}: {reason}")
            continue
        verdict = judge(base, new)
        if verdict.word in ("slower", "unclear"):
            # A second look before anybody is alarmed.
            more_base, more_new = timer.pairs(base_tree, root, args.pairs)
            base, new = base + more_base, new + more_new
            verdict = judge(base, new)
        failed += verdict.word == "slower"
        compared += 1
        milliseconds = [number(statistics.median(side) * 1e3) for side in (base, new)]
        print(
            f"  {verdict.word:8} {name}: {milliseconds[0]} -> {milliseconds[1]} ms, "
            f"{verdict.ratio:.2f} +- {verdict.noise:.2f}"
        )
    if failed:
        print(f"{failed} red, or slower by more than {THRESHOLD:.0%} beyond the noise")
    else:
        print("nothing slower" if compared else "nothing was compared; the base runs none of it")
    return int(failed > 0 or not compared)


class Unavailable(RuntimeError):
    """A tree cannot run a case; the message says which and why.

    ``red``: it ran and the result is wrong, or this tree cannot run what the base can.
    """

    def __init__(self, reason: str, red: bool = False) -> None:
        super().__init__(reason)
        self.red = red


class Timer(NamedTuple):
    """Times one case in processes of their own."""

    case: Case
    impl: str
    mode: str
    rounds: int
    device: str

    def pairs(self, base: Path, new: Path, count: int) -> tuple[list[float], list[float]]:
        """Median seconds of ``count`` processes of either tree, in turn: base, new, new, base, ...

        Raises:
            Unavailable: a tree cannot run the case.
        """
        found: dict[Path, list[float]] = {base: [], new: []}
        for number_of_pair in range(count):
            order = (base, new) if number_of_pair % 2 == 0 else (new, base)
            for tree in order:
                try:
                    found[tree].append(self._one(tree))
                except Unavailable as reason:
                    reason.red |= tree == new  # the base came first, and could
                    raise
        return found[base], found[new]

    def _one(self, tree: Path) -> float:
        bench = str(Path(__file__).resolve().parent)
        done = subprocess.run(
            [sys.executable, "-c", BOOTSTRAP, str(tree), bench, pack(*self)],
            capture_output=True,
            text=True,
            cwd=tree,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Unavailable(f"{tree}: {lines[-1]}")
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if "reason" in answer:
            raise Unavailable(f"{tree.name}: {answer['reason']}", answer.get("red", False))
        return answer["seconds"]


@contextmanager
def checkout(root: Path, commit: str) -> Iterator[Path]:
    """A work tree of a commit beside this one, with its native library; removed afterwards.

    Raises:
        ValueError: there is no such commit, or no git checkout at all.
    """
    # A termination unwinds like Ctrl-C; by default it would leave the work tree, and git's note of it, behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    git = ["git", "-C", str(root)]
    _clear_up(git)
    tree = Path(tempfile.mkdtemp(prefix=PREFIX)) / "base"
    try:
        with locked(tree.parent / LOCK):
            added = subprocess.run(
                [*git, "worktree", "add", "--detach", str(tree), commit],
                capture_output=True,
                text=True,
            )
            if added.returncode:
                raise ValueError(f"base={commit!r}: {added.stderr.strip().splitlines()[-1]}")
            _native_library(root, tree, commit)
            yield tree
    finally:
        _remove(git, tree)
        signal.signal(signal.SIGTERM, before)


def _clear_up(git: Sequence[str]) -> None:
    """Remove the work trees of runs that were killed, which hold no lock any more."""
    asked = [*git, "worktree", "list", "--porcelain"]
    for line in subprocess.run(asked, capture_output=True, text=True).stdout.splitlines():
        tree = Path(line.removeprefix("worktree "))
        if tree.parent.name.startswith(PREFIX):
            with suppress(InUseError, OSError), locked(tree.parent / LOCK):
                _remove(git, tree)


def _remove(git: Sequence[str], tree: Path) -> None:
    subprocess.run([*git, "worktree", "remove", "--force", str(tree)], capture_output=True)
    shutil.rmtree(tree.parent, ignore_errors=True)


def _native_library(root: Path, tree: Path, commit: str) -> None:
    """Give the base its compiled module: this tree's where the sources are the same, else build it."""
    package = root / "bertkd"
    here = [*package.glob("_C*.so"), *package.glob("_build_info.json")]
    sources = ["csrc", "build_support", "setup.py"]
    same = subprocess.run(["git", "-C", str(root), "diff", "--quiet", commit, "--", *sources])
    if same.returncode == 0:
        for library in here:
            shutil.copy2(library, tree / "bertkd" / library.name)
    elif here and (tree / "setup.py").exists():
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, capture_output=True)
