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
from collections.abc import Sequence
from pathlib import Path

from bertkd.bench import compare, readme
from bertkd.bench.commandline import BROKEN_PIPE, INTERRUPTED, Options, plain_parser, stop_writing
from bertkd.bench.listing import listing
from bertkd.bench.runner import RESULTS, plan, report, run_apart
from bertkd.study.files import check_output_dir

ERROR, USAGE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (1: it failed, 2: wrong usage, 130: interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"report": _report, "readme": readme.main, "compare": compare.main}
    try:
        command = commands.get(words[0]) if words else None
        code = command(words[1:]) if command else _bench(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        stop_writing()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("bertkd bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        return _failed(error, USAGE)


def _bench(words: Sequence[str]) -> int:
    parser = plain_parser(Options, prog="python -m bertkd.bench", description=__doc__)
    parser.add_argument(
        "--list", action="store_true", help="Show the cases and who can take part, and run nothing."
    )
    values = vars(parser.parse_args(words))
    only_list = values.pop("list")
    job = plan(Options(**values))
    if only_list:
        print(listing(job))
        return 0
    check_output_dir(job.output_dir, "bench", reuse=True)
    try:
        run_apart(job)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _failed(error, ERROR)
    return 0


def _failed(error: Exception, code: int) -> int:
    print(f"bertkd bench: error: {error}", file=sys.stderr)
    return code


def _report(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bertkd.bench report")
    parser.add_argument("folder", type=Path, help="folder of the results")
    folder = parser.parse_args(words).folder
    if not (folder / RESULTS).is_file():
        raise ValueError(f"folder={str(folder)!r} holds no {RESULTS}; name a benchmark's folder.")
    print(report(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
