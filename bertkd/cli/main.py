"""``bertkd``: the commands, their errors and exit codes.

0: all went well. 1: something failed while running. 2: the command or its configuration is wrong;
nothing has been trained or written. 130: interrupted.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType

from jsonargparse import Namespace

import bertkd
from bertkd.cli import bench, demo, distill, evaluate, finetune, info, topic, tune, verify
from bertkd.cli.parser import (
    USAGE_ERROR,
    CommandParser,
    command_parser,
    config_from,
    with_underscores,
)
from bertkd.errors import CheckpointError, NonFiniteError

COMMANDS = {
    "finetune": finetune,
    "distill": distill,
    "evaluate": evaluate,
    "info": info,
    "verify": verify,
    "bench": bench,
    "tune": tune,
    "demo": demo,
}
STUDIES = {"topic": topic}

OK, RUNTIME_ERROR, INTERRUPTED = 0, 1, 130

DESCRIPTION = """Distil BERT-family encoders into smaller ones. Start with `bertkd demo`; for a task of
your own, `bertkd finetune` makes a teacher and `bertkd distill` a student of it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``bertkd``; those of the process by default.

    Returns:
        The exit code, see the module's docstring.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--version``, with 2 for arguments that do not parse.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = with_underscores(sys.argv[1:] if argv is None else argv)
    values = build_parser().parse_args(words or ["--help"])
    name, known, values = values.command, COMMANDS, values[values.command]
    if name == "study":
        name, known, values = values.study, STUDIES, values[values.study]
    with warnings.catch_warnings():
        # Users need what a warning says, not the line of code that says it.
        warnings.showwarning = lambda message, *_: logging.warning("%s", message)
        return _run(name, known[name], values)


def _run(name: str, command: ModuleType, values: Namespace) -> int:
    try:
        run = command.prepare(config_from(command.Config, values))
    except (ValueError, TypeError, OSError) as error:
        return _failed(name, error, USAGE_ERROR, values.debug)
    except (CheckpointError, ImportError) as error:
        return _failed(name, error, RUNTIME_ERROR, values.debug)
    try:
        run()
    except (ValueError, OSError, ImportError, CheckpointError, NonFiniteError) as error:
        return _failed(name, error, RUNTIME_ERROR, values.debug)
    except KeyboardInterrupt:
        print(f"bertkd {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return OK


def build_parser() -> CommandParser:
    """The parser of all commands."""
    parser = CommandParser(prog="bertkd", description=DESCRIPTION, version=bertkd.__version__)
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        commands.add_subcommand(
            name, command_parser(name, module.Config), help=_first_line(module.Config)
        )
    study = CommandParser(description="Run a study: several trainings, compared in one table.")
    commands.add_subcommand("study", study, help="Run a study: several trainings in one table.")
    studies = study.add_subcommands(dest="study", title="studies", metavar="STUDY")
    for name, module in STUDIES.items():
        studies.add_subcommand(
            name, command_parser(f"study {name}", module.Config), help=_first_line(module.Config)
        )
    return parser


def _first_line(config: type) -> str:
    return (config.__doc__ or "").strip().splitlines()[0]


def _failed(name: str, error: BaseException, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"bertkd {name}: error: {text}", file=sys.stderr)
    return code
