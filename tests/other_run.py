"""A run in a process of its own, which holds a folder; for tests of what comes second."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bertkd.study.files import held_output_dir


@contextmanager
def other_run_in(folder: Path, command: str) -> Iterator[None]:
    """Another run of ``command`` is at work in ``folder`` as long as this lasts, and is killed then."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        with held_output_dir(folder, command):
            os.write(said, b".")
            signal.pause()
    try:
        os.close(said)
        assert os.read(ready, 1)
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
