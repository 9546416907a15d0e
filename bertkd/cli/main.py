"""``bertkd``: the commands, their errors and exit codes.

0: all went well. 1: something failed while running. 2: the command or its configuration is wrong;
nothing has been trained or written. 130: interrupted. 141: nobody reads the output any more.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import bertkd
from bertkd.bench.commandline import BROKEN_PIPE, INTERRUPTED, stop_writing
from bertkd.cli import bench, demo, distill, evaluate, finetune, info, topic, tune, verify
from bertkd.cli.plain import TORCH_ALONE, config_from, plain_command_parser, with_underscores
from bertkd.errors import CheckpointError, NonFiniteError, ran_out_of_memory

if TYPE_CHECKING:
    from bertkd.cli.parser import CommandParser

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

OK, RUNTIME_ERROR, USAGE_ERROR = 0, 1, 2

# What installs an optional library, by the name that it is imported by.
EXTRAS = {
    **dict.fromkeys(
        ("transformers", "accelerate", "datasets", "safetensors", "sklearn", "scipy", "matplotlib"),
        "train",
    ),
    **dict.fromkeys(("jsonargparse", "docstring_parser", "yaml", "tensorboard", "tqdm"), "train"),
    "triton": "triton",
}

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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # Of several processes only the first warns.
    level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    words = with_underscores(sys.argv[1:] if argv is None else argv)
    # A folder's or a task's name that the output cannot hold (PYTHONIOENCODING, a Latin-1 locale) must not fail a run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        name, command, values = _parsed(words or ["--help"])
        with warnings.catch_warnings():
            # Users need what a warning says, not the line of code that says it.
            warnings.showwarning = lambda message, *_: logging.warning("%s", message)
            code = _run(name, command, values)
        _leave_process_group(code)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        # While the options were read, or once more while a first one was cleared up after.
        print("bertkd: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        stop_writing()
        return BROKEN_PIPE


def _parsed(words: Sequence[str]) -> tuple[str, ModuleType, dict[str, Any]]:
    """Name and module of the command, and the values of its options."""
    try:
        parser = build_parser()
    except ImportError as missing:
        return _plainly_parsed(words, missing)
    values = parser.parse_args(list(words))
    name, known, values = values.command, COMMANDS, values[values.command]
    if name == "study":
        name, known, values = values.study, STUDIES, values[values.study]
        return f"study {name}", known[name], values.as_dict()
    return name, known[name], values.as_dict()


def _plainly_parsed(
    words: Sequence[str], missing: ImportError
) -> tuple[str, ModuleType, dict[str, Any]]:
    """The same without jsonargparse, for the commands that need torch alone."""
    name = words[0]
    if name == "--version":
        print(f"bertkd {bertkd.__version__}")
        raise SystemExit(OK)
    if name in TORCH_ALONE:
        values = plain_command_parser(name, COMMANDS[name].Config).parse_args(words[1:])
        return name, COMMANDS[name], vars(values)
    alone = f"Without it there are {', '.join(f'`bertkd {each}`' for each in TORCH_ALONE)}."
    print(f"bertkd: error: {_said(missing)}. {alone}", file=sys.stderr)
    raise SystemExit(RUNTIME_ERROR)


def _run(name: str, command: ModuleType, values: dict[str, Any]) -> int:
    debug = values["debug"]
    try:
        try:
            run = command.prepare(config_from(command.Config, values))
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError) as error:
            return _failed(name, error, USAGE_ERROR, debug)
        run()
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, CheckpointError, NonFiniteError) as error:
        return _failed(name, error, RUNTIME_ERROR, debug)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        return _failed(name, error, RUNTIME_ERROR, debug)
    except KeyboardInterrupt:
        print(f"bertkd {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return OK


def _leave_process_group(code: int) -> None:
    """Part from the other processes of this run, if there are any.

    An interpreter that ends with Gloo's threads alive may abort (pytorch/pytorch#179291), and the launcher would
    report a run that went well as failed. After an error others may still wait for this process; Gloo does not
    care, but NCCL would wait for them.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    if code == OK or distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def build_parser() -> CommandParser:
    """The parser of all commands.

    Raises:
        ImportError: what it needs is not installed.
    """
    from bertkd.cli.parser import CommandParser, command_parser

    parser = CommandParser(prog="bertkd", description=DESCRIPTION, version=bertkd.__version__)
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        commands.add_subcommand(
            name, command_parser(name, module.Config), help=_first_line(module.Config)
        )
    study = CommandParser(
        usage="bertkd study STUDY ...",
        description="Run a study: several trainings, compared in one table.",
    )
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
    print(f"bertkd {name}: error: {_said(error)}", file=sys.stderr)
    return code


def _said(error: BaseException) -> str:
    """What an error says, on one line; of a library that is missing, or of memory that ran out, also what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if ran_out_of_memory(error):
        return f"out of memory ({text}): fewer or shorter texts at a time (batch_size, max_length) need less"
    module = (getattr(error, "name", None) or "").partition(".")[0]
    known = isinstance(error, ImportError) and "pip install" not in text
    if known and module in EXTRAS:
        text += f"; pip install 'bertkd[{EXTRAS[module]}]' brings it"
    return text
