"""Compiles every Triton kernel in every shipped form and prints what each one uses; needs no GPU.

    python benchmarks/kernels_report [--quick] [--op OP ...] [--arch 80 90] [--jobs 2] [--loops] [--cases FILE ...]

Registers, spills, shared memory and instructions are read from the compiled cubin and held to budgets; the exit status
is 1 if one is broken. Compilations are cached by Triton (``TRITON_CACHE_DIR``). ``harness.py`` says how to add cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path

# The interpreter replaces the kernels by something that cannot be compiled.
if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
    print("TRITON_INTERPRET is ignored: this report compiles", file=sys.stderr)

from harness import Case, Result, examine

HERE = Path(__file__).resolve().parent
OWN_FILES = {"__main__", "harness", "cubin"}
HEADER = (
    f"{'op':20s} {'form':20s} {'dtype':11s} {'D':>6s} {'arch':>4s} {'warps':>5s} {'regs':>4s} {'spills':>6s} "
    f"{'smem':>6s} {'MMA':>4s} {'MUFU':>4s} {'instr/pair':>10s}  ok"
)


def load(files: Iterable[Path]) -> list[Case]:
    """The cases of every file, in order."""
    found: list[Case] = []
    for file in files:
        spec = importlib.util.spec_from_file_location(f"cases_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.cases()
    return found


def row(case: Case, result: Result) -> str:
    """A line of the table."""
    per_pair = "" if result.per_pair is None else f"{result.per_pair:.2f}"
    return (
        f"{case.op:20s} {case.form:20s} {case.dtype:11s} {case.width:6d} {case.arch:4d} {case.num_warps:5d} "
        f"{result.registers:4d} {result.spills:6d} {result.shared:6d} {result.matrix:4d} {result.mufu:4d} "
        f"{per_pair:>10s}  {'; '.join(result.broken) or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the cases marked quick")
    parser.add_argument("--op", nargs="*", help="only these ops")
    parser.add_argument("--arch", nargs="*", type=int, help="only these architectures")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--loops", action="store_true", help="describe the innermost loops")
    parser.add_argument("--cases", nargs="*", type=Path, help="files of cases; all of this folder")
    args = parser.parse_args()
    files = args.cases or sorted(f for f in HERE.glob("*.py") if f.stem not in OWN_FILES)
    selected = [
        case
        for case in load(files)
        if (not args.quick or case.quick)
        and (not args.op or case.op in args.op)
        and (not args.arch or case.arch in args.arch)
    ]
    print(HEADER, flush=True)
    failures = 0
    for case, result in zip(selected, _results(selected, args.jobs), strict=True):
        print(row(case, result), flush=True)
        for index, loop in enumerate(result.loops if args.loops else ()):
            print(f"    loop {index}: {loop}")
        failures += bool(result.broken)
    print(f"{len(selected)} compiled, {failures} over budget")
    return 1 if failures or not selected else 0


def _results(cases: list[Case], jobs: int) -> Iterable[Result]:
    if jobs <= 1:
        return map(examine, cases)
    # Kernels cannot be pickled: the workers inherit the list and are told an index.
    global _inherited
    _inherited = cases
    pool = multiprocessing.get_context("fork").Pool(jobs)
    return pool.imap(_examine_inherited, range(len(cases)))


_inherited: list[Case] = []


def _examine_inherited(index: int) -> Result:
    return examine(_inherited[index])


if __name__ == "__main__":
    sys.exit(main())
