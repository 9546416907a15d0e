"""One parser per command, made from the fields of its config dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints

import jsonargparse

USAGE_ERROR = 2


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, examples and all."""


class CommandParser(jsonargparse.ArgumentParser):
    """A jsonargparse parser whose errors are one short paragraph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A subcommand's own formatter would give way to that of the parser above it.
        super().__init__(*args, **{"formatter_class": _Formatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, the nearest known flag where one was misspelt, and exit with 2."""
        message = re.sub(r"\s*\n\s*", " ", str(message)).strip()
        message = message.replace("<class '", "").replace("'>", "")
        for flag in re.findall(r"--[\w-]+", message):
            if flag not in self._flags():
                close = difflib.get_close_matches(flag, self._flags(), n=1)
                message += f". Did you mean {close[0]}?" if close else ""
        command = self.prog.replace("[options] ", "")
        print(f"{command}: error: {message}\nSee `{command} --help`.", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def command_parser(name: str, config: type) -> CommandParser:
    """A parser with one flag per field of ``config``, its own first, then those of each base class.

    ``--config FILE`` reads options from YAML; flags after it override the file. Booleans may stand
    alone: ``--resume`` is ``--resume true``.

    Args:
        name: the command's words, e.g. ``"study topic"``.
        config: a dataclass; its docstring up to ``Attributes:`` describes the command, the rest and
            the first lines of its bases' docstrings describe the options.
    """
    description = inspect.cleandoc(config.__doc__ or "").partition("Attributes:")[0].strip()
    parser = CommandParser(usage=f"bertkd {name} [options]", description=description)
    parser.add_argument("--config", action="config", help="YAML file with options of this command.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    bases = config.__bases__ if config.__bases__ != (object,) else ()
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    parser.add_class_arguments(config, as_group=False, skip=inherited)
    for base in bases:
        parser.add_class_arguments(base, as_group=True)
    hints = get_type_hints(config)
    for action in parser._actions:
        if "bool" in str(hints.get(action.dest)):
            action.nargs, action.const = "?", True
    return parser


def config_from(config: type, values: Any) -> Any:
    """The dataclass from parsed values; extra keys such as ``debug`` are left out."""
    names = [field.name for field in dataclasses.fields(config)]
    return config(**{name: values[name] for name in names})


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Flags as the parser knows them: ``--dry-run`` becomes ``--dry_run``; values are left alone."""
    return [
        re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), word)
        for word in argv
    ]
