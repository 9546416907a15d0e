"""A lock on a file that ends with the process that holds it, however that ends."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".bertkd-lock"

logger = logging.getLogger(__name__)


class InUseError(Exception):
    """A folder's lock is another run's; reads on after the folder's name, and says whose it is and what to do."""

    def __init__(self, holder: str) -> None:
        super().__init__(
            f"is in use by another run ({holder}): wait for its end, or name another place"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path`` with this process's number in it; the file is there as long as the lock.

    Raises:
        InUseError: another process holds it.
        OSError: the file cannot be made or written to.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(lock)
        while not _is_at(path, lock):  # its holder has just ended, and took the file along
            os.close(lock)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(lock)
        try:
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _lock(lock: int) -> None:
    import fcntl  # not everywhere, and `bertkd info` should be

    try:
        # Not flock, which workers that outlive a killed process would hold on.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InUseError(os.read(lock, 200).decode(errors="replace")) from error
    except OSError as error:
        logger.warning(
            "the file system of output_dir has no locks (%s): start no second run in it",
            error.strerror,
        )


def _is_at(path: Path, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False
