"""One run to a folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

LOCK = ".bertkd-lock"

logger = logging.getLogger(__name__)


@contextmanager
def kept_from_others(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make ``output_dir`` and keep other runs out of it; the main process locks it for all of this one.

    Two runs would replace and delete each other's checkpoints, and end with each other's weights.

    Raises:
        ValueError: in all processes: another run is at work there, or the folder cannot be made or
            written to.
    """
    reason = None
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(output_dir / LOCK))
            except _InUseError as holder:
                reason = (
                    f"is in use by another run ({holder}): wait for its end, or name another place"
                )
            except (FileExistsError, NotADirectoryError):
                reason = "cannot be a folder: it is, or lies in, a file or a link to nowhere; name another place"
            except OSError as error:
                reason = f"cannot be written to ({error.strerror}); name another place"
        if reason := next(filter(None, gather_object([reason])), None):
            raise ValueError(f"output_dir {str(output_dir)!r} {reason}")
        yield


class _InUseError(Exception):
    """Says who holds a lock."""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path`` with this process's number in it; the file is there as long as the lock."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(lock)
        while not _is_at(path, lock):  # its holder has just ended, and took the file along
            os.close(lock)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(lock)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _lock(lock: int) -> None:
    try:
        # Not flock, which workers that outlive a killed process would hold on.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise _InUseError(os.read(lock, 200).decode(errors="replace")) from error
    except OSError as error:
        logger.warning(
            "the file system of output_dir has no locks (%s): start no second run in it",
            error.strerror,
        )


def _is_at(path: Path, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False
