"""Directories that appear whole or not at all, even if the power fails, and what a kill leaves behind."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bertkd._files import sync

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old)")


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; it takes ``path``'s name once everything is on disk.

    What was at ``path`` is replaced. After an exception it is there as before, and nothing is left
    of the temporary directory; after a kill ``clear_leftovers`` sees to both.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    old = path.parent / f".{path.name}.{os.getpid()}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for item in sorted(temporary.rglob("*")):
            sync(item)
        sync(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_leftovers(parent: Path, stem: str) -> None:
    """Remove what killed processes left behind for names starting with ``stem``.

    A directory that was moved away to be replaced, and was not, gets its name back.
    """
    for leftover in parent.glob(f".{glob.escape(stem)}*"):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None or _at_work(int(match["process"])):
            continue
        path = parent / match["name"]
        if match["kind"] == "old" and not path.exists():
            os.rename(leftover, path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _at_work(process: int) -> bool:
    """Whether another process of this number lives; this one is not writing where it clears up."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
