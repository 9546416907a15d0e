"""Directories that appear whole or not at all, even if the power fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bertkd._files import sync


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; it takes ``path``'s name once everything is on disk.

    What was at ``path`` is replaced. After an exception it is there as before, and nothing is left
    of the temporary directory; after a kill ``_files.clear_leftovers`` sees to both.
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
