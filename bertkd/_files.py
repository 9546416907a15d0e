"""Files that appear whole or not at all, even if the power fails, and the folder of the caches."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
