"""``python -m bertkd.bench``: the command with nothing but torch and the standard library.

python -m bertkd.bench [--select ...] [--device ...] [--output_dir ...] [--budget_minutes ...]
python -m bertkd.bench --list
python -m bertkd.bench report FOLDER           summary and plots again, from the CSV
python -m bertkd.bench readme [--check]        the README's figures, from the committed CSV
python -m bertkd.bench compare --base COMMIT   this tree against a commit, case by case
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bertkd.bench import compare, readme
from bertkd.bench.listing import listing
from bertkd.bench.runner import Options, plan, report, run

ERROR, USAGE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (2: wrong usage, 1: a check failed)."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"report": _report, "readme": readme.main, "compare": compare.main}
    try:
        if words and words[0] in commands:
            return commands[words[0]](words[1:])
        return _bench(words)
    except (ValueError, OSError) as error:
        print(f"bertkd bench: error: {error}", file=sys.stderr)
        return USAGE


def _bench(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bertkd.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in fields(Options):
        parser.add_argument(f"--{field.name}", default=field.default, type=_TYPES[field.name])
    parser.add_argument(
        "--list", action="store_true", help="show cases and contestants, run nothing"
    )
    values = vars(parser.parse_args(words))
    only_list = values.pop("list")
    job = plan(Options(**values))
    if only_list:
        print(listing(job))
        return 0
    run(job, apart=True)
    return 0


def _report(words: Sequence[str]) -> int:
    if len(words) != 1:
        raise ValueError("report takes one argument, the folder of the results.")
    print(report(Path(words[0])))
    return 0


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


_TYPES: dict[str, Callable[[str], Any]] = {
    "select": str,
    "device": str,
    "output_dir": str,
    "rounds": int,
    "seconds": float,
    "budget_minutes": float,
    "memory": _boolean,
    "largest_batch": _boolean,
    "plots": _boolean,
}


if __name__ == "__main__":
    sys.exit(main())
