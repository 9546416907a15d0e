"""The options of a run, and what a command line needs where only torch is installed."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

# Exit codes, as shells give them to a process that died of the signal.
INTERRUPTED, BROKEN_PIPE = 130, 141


@dataclass(frozen=True)
class Options:
    """Measurement

    Attributes:
        select: Conditions that must all hold, FIELD=VALUE|VALUE with * and ?, comma-separated; the fields are
            kind, op, impl, mode, dtype, padding, B, H, L, D, N, V, n, P. A bare word is an op or a kind. Default: all.
        device: "cpu", "cuda" or "cuda:N". Default: the GPU if there is one.
        output_dir: Folder of the results. Default: benchmarks/results/DEVICE in a checkout, else bench/DEVICE.
        rounds: Timed rounds of a case; fewer where they take longer than `seconds`, but at least 3.
        seconds: Time for the rounds of a case in a mode.
        budget_minutes: Start no case after this time, and name those left out. Default: no limit.
        memory: Measure peak memory too.
        largest_batch: On a GPU, search for the largest batch with which a training step fits, which takes a minute.
        plots: Draw the pictures too; needs matplotlib.
    """

    select: str | None = None
    device: str | None = None
    output_dir: str | None = None
    rounds: int = 15
    seconds: float = 15.0
    budget_minutes: float | None = None
    memory: bool = True
    largest_batch: bool = True
    plots: bool = True


def stop_writing() -> None:
    """Nobody reads the output any more, as behind ``| head``: what is still buffered goes nowhere."""
    with suppress(OSError, ValueError):  # no file is behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def description(config: type) -> str:
    """A dataclass's docstring up to its attributes."""
    return inspect.cleandoc(config.__doc__ or "").partition("Attributes:")[0].strip()


def plain_parser(config: type, **options: Any) -> argparse.ArgumentParser:
    """A parser with a flag per field of a dataclass, explained by its docstring and those of its bases.

    Args:
        config: a dataclass of strings, numbers, booleans and lists of them.
        **options: of the parser.
    """
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
    )
    hints = get_type_hints(config)
    texts = _explained(config)
    for field in fields(config):
        kind = hints[field.name]
        # "%" would be taken for a format.
        more: dict[str, Any] = {"help": texts.get(field.name, "").replace("%", "%%")}
        if kind is bool:
            more |= {"nargs": "?", "const": True, "metavar": "true|false"}
        parser.add_argument(f"--{field.name}", default=_default(field), type=_reader(kind), **more)
    return parser


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _explained(config: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in reversed(config.__mro__):
        part = inspect.cleandoc(each.__doc__ or "").partition("Attributes:")[2]
        for name, text in re.findall(r"^ {4}(\w+): ((?:.|\n(?! {4}\w))*)", part, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _reader(kind: Any) -> Callable[[str], Any]:
    if kind is bool:
        return _boolean
    if get_origin(kind) is list:
        return _listed(get_args(kind)[0])
    return next((each for each in get_args(kind) if each is not type(None)), kind)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list]:
    def read(text: str) -> list:
        words = text.removeprefix("[").removesuffix("]").split(",")
        try:
            return [kind(word.strip().strip("'\"")) for word in words if word.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a list, got {text!r}") from None

    return read
