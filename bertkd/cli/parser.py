"""One parser per command, made from the fields of its config dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn, get_type_hints

import jsonargparse

from bertkd.bench.commandline import description

USAGE_ERROR = 2
CONFIG = "--config"


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, examples and all."""


class CommandParser(jsonargparse.ArgumentParser):
    """A jsonargparse parser whose errors are one short paragraph, and whose flags override ``--config``."""

    _file: str | None = None  # the --config file that is being read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A subcommand's own formatter would give way to that of the parser above it. Shortened flags
        # are as unknown as without jsonargparse: `--conf` would not be put first.
        super().__init__(*args, **{"formatter_class": _Formatter, "allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """As jsonargparse's, with ``--config`` read before the flags, wherever it stands among them."""
        words = list(sys.argv[1:] if args is None else args)
        if CONFIG in self._flags():
            words = _config_first(words)
        return super().parse_args(words, *more, **options)

    def parse_path(self, path: Any, *more: Any, **options: Any) -> Any:
        """As jsonargparse's; errors name the file, and so do those about options that do not exist."""
        self._file = str(path)
        values = super().parse_path(path, *more, **options)
        for key in vars(values):
            if key not in {action.dest for action in self._actions}:
                self.error(f"unknown option --{key}")
        self._file = None
        return values

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, the nearest known flag where one was misspelt, and exit with 2."""
        message = re.sub(r"\s*\n\s*", " ", str(message)).strip()
        message = message.replace("<class '", "").replace("'>", "")
        unknown = [flag for flag in re.findall(r"--[\w-]+", message) if flag not in self._flags()]
        close = [near for flag in unknown for near in self._nearest(flag)]
        message += f". Did you mean {', '.join(close)}?" if close else ""
        command = re.sub(r"\[options\] |\S+ \.\.\. ", "", self.prog)
        # Errors in a subcommand may come from the parser above it, by "command.option".
        for key in re.findall(r"(?:required: |^expected \")((?:\w+\.)*)", message):
            command = " ".join([command, *key.split(".")]).strip()
        message = _as_typed(message)
        if self._file is not None:
            message = f"{self._file}: {message}"
        print(f"{command}: error: {message}\nSee `{command} --help`.", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)

    def _nearest(self, flag: str) -> list[str]:
        """The known flag that was probably meant, if there is one; the dashes that all share make none alike."""
        names = [known.lstrip("-") for known in self._flags()]
        return [f"--{name}" for name in difflib.get_close_matches(flag.lstrip("-"), names, n=1)]

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _config_first(words: Sequence[str]) -> list[str]:
    """``--config`` files before the flags: jsonargparse lets what it reads last win."""
    first, others = [], []
    rest = iter(words)
    for word in rest:
        if word == CONFIG:
            first += [word, *islice(rest, 1)]
        else:
            (first if word.startswith(f"{CONFIG}=") else others).append(word)
    return first + others


def _as_typed(message: str) -> str:
    """jsonargparse's message with options as the user types them, and types in plain words."""
    if found := re.fullmatch(r'expected "[\w.]+" to be one of {(.*)}, but it was not .*', message):
        return f"name one of: {found[1]}."
    if found := re.fullmatch(r"Unexpected config:(.*)", message):
        return (
            f"expected options, one `name: value` a line, got {found[1].strip()[:80] or 'nothing'}."
        )
    start = "the following arguments are required: "
    if message.startswith(start):
        keys = message.removeprefix(start).split(", ")
        return start + ", ".join("--" + key.rpartition(".")[2] for key in keys)
    message = re.sub(r'^Parser key "([\w.]+)":', r"--\1:", message)
    union = re.search(
        r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*)"
        r" Given value type: \w+ Given value: (.*)$",
        message,
    )
    if union:
        kinds = [re.sub(r"^Expected an? ", "", each) for each in union[1].split(" - ")]
        message = f"{message[: union.start()]}Expected {' or '.join(kinds)}. Got value: {union[2]}"
    message = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(r"\bNoneType\b", "null", message)
    message = message.replace("Expected a int", "Expected an int")
    return re.sub(r"Expected a list\. Got", 'Expected a list, e.g. "[a,b]". Got', message)


def command_parser(name: str, config: type) -> CommandParser:
    """A parser with one flag per field of ``config``, its own first, then those of each base class.

    ``--config FILE`` reads options from YAML; flags override it. Booleans may stand alone:
    ``--resume`` is ``--resume true``.

    Args:
        name: the command's words, e.g. ``"study topic"``.
        config: a dataclass; its docstring up to ``Attributes:`` describes the command, the rest and
            the first lines of its bases' docstrings describe the options.
    """
    parser = CommandParser(usage=f"bertkd {name} [options]", description=description(config))
    parser.add_argument(CONFIG, action="config", help="YAML file with options of this command.")
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
