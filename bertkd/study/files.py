"""Output directories that are never overwritten by mistake, and files never half written."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bertkd._files import clear_leftovers, whole_file
from bertkd._locks import LOCK, InUseError, locked

MARKER = "bertkd_run.json"
_TRIAL = ".bertkd-trial-"
_UNSIGNED = (_TRIAL, f".{MARKER}.")


def check_output_dir(path: str | Path, command: str, *, reuse: bool = False) -> Path:
    """Refuse a directory that cannot or must not be written to; leaves nothing behind.

    Args:
        path: where the run wants to write.
        command: the command that asks, e.g. ``"distill"``.
        reuse: whether the directory of an earlier run of the same command may be written to.

    Raises:
        ValueError: it is a file, cannot be created or written to, has a name that is not UTF-8, holds something
            that bertkd did not make, was made by another command, or holds an earlier run while ``reuse`` is false.
    """
    path = Path(path)
    # They would fail at the end of a training, and again whenever it is resumed.
    if os.fsencode(path) != str(path).encode(errors="replace"):
        raise ValueError(
            f"output_dir {str(path)!r} is not UTF-8 (file names are {sys.getfilesystemencoding()} in this locale), as "
            "safetensors, tokenizers and TensorBoard need it; name another place."
        )
    if path.is_symlink() and not path.exists():
        raise ValueError(f"output_dir {str(path)!r} is a link to nowhere; name a directory.")
    if not path.exists():
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if reason := _why_not_writable(above):
            raise ValueError(
                f"output_dir {str(path)!r} cannot be created: {str(above)!r} {reason}; name another place."
            )
        return path
    if not path.is_dir():
        raise ValueError(f"output_dir {str(path)!r} is a file; name a directory.")
    if reason := _why_not_writable(path):
        raise ValueError(f"output_dir {str(path)!r} {reason}; name another place.")
    # Other processes of the run may be looking at it too, and one killed while it signed the folder leaves half a name.
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(_UNSIGNED)}
    if not names:
        return path
    maker = _maker(path)
    if maker is None:
        raise ValueError(
            f"output_dir {str(path)!r} is not empty and was not made by bertkd; "
            "name an empty or a new directory."
        )
    if maker != command:
        raise ValueError(
            f"output_dir {str(path)!r} holds a run of `bertkd {maker}`, not of `bertkd {command}`; "
            "name another directory."
        )
    if not reuse:
        raise ValueError(
            f"output_dir {str(path)!r} holds an earlier run; pass --resume to go on with it, "
            "or name another directory."
        )
    return path


def claim_output_dir(path: str | Path, command: str, *, reuse: bool = False) -> Path:
    """:func:`check_output_dir`, then create the directory and sign it with a marker file."""
    path = check_output_dir(path, command, reuse=reuse)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / MARKER, {"command": command})
    except OSError as error:
        raise _not_writable(path, error) from error
    return path


@contextmanager
def held_output_dir(path: str | Path, command: str) -> Iterator[Path]:
    """:func:`claim_output_dir`, new or not, other runs kept out of it as long as this lasts, without what kills left.

    For commands that work in one process: of two in one folder each would delete or replace what the other writes.

    Raises:
        ValueError: as ``claim_output_dir``, or another run is at work there.
    """
    path = claim_output_dir(path, command, reuse=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(path / LOCK))
        except InUseError as error:
            raise ValueError(f"output_dir {str(path)!r} {error}.") from error
        except OSError as error:
            raise _not_writable(path, error) from error
        # The folders in it are those of seeds and attempts.
        for folder in (path, *(inside for inside in path.iterdir() if inside.is_dir())):
            clear_leftovers(folder, "")
        yield path


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file atomically: readers see the old content or the new, never a part."""
    return write_through(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write strict JSON atomically; NaN and infinities raise ``ValueError``."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_through(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place."""
    path = Path(path)
    with whole_file(path) as temporary:
        write(temporary)
    return path


def _why_not_writable(folder: Path) -> str | None:
    """Why nothing can be made in ``folder``; found by trying, as root may write where nobody can (/proc)."""
    if not folder.is_dir():
        return "is a file"
    try:
        tempfile.TemporaryDirectory(prefix=_TRIAL, dir=folder).cleanup()
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return None


def _not_writable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"output_dir {str(path)!r} cannot be written to ({error.strerror}); name another place."
    )


def _maker(path: Path) -> str | None:
    try:
        return json.loads((path / MARKER).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
