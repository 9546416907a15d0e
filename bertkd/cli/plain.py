"""What the command line can do without jsonargparse, which comes with ``bertkd[train]``."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bertkd.bench.commandline import description, plain_parser

# The commands that need nothing but torch.
TORCH_ALONE = ("info", "verify", "bench", "tune")


def plain_command_parser(name: str, config: type) -> argparse.ArgumentParser:
    """The parser of a command, of the standard library alone: no ``--config``, else the same flags.

    Args:
        name: the command's name.
        config: its dataclass, of strings, numbers, booleans and lists of them.
    """
    parser = plain_parser(config, prog=f"bertkd {name}", description=description(config))
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def config_from(config: type, values: Mapping[str, Any]) -> Any:
    """The dataclass from parsed values; extra keys such as ``debug`` are left out."""
    names = [field.name for field in dataclasses.fields(config)]
    return config(**{name: values[name] for name in names})


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Flags as the parser knows them: ``--dry-run`` becomes ``--dry_run``; values are left alone."""
    return [
        re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), word)
        for word in argv
    ]
