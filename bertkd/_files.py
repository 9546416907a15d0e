"""Files that appear whole or not at all, what kills leave of them and of folders, and the folder of the caches."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old)")


def user_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/bertkd``, or ``~/.cache/bertkd`` where that is not set; ``bertkd-UID`` among temporary
    files for a user without a home.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "bertkd"
    try:
        return Path.home() / ".cache" / "bertkd"
    except RuntimeError:  # no HOME, and a user known by number alone, as in containers
        return Path(tempfile.gettempdir()) / f"bertkd-{os.getuid()}"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` to write; it takes that name once it is on disk.

    What was at ``path`` is replaced in one go. After an exception it is there as before, and nothing is left of
    the temporary file.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` that names no file, as that of a full disk, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
