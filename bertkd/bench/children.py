"""Processes of a benchmark's own: what they are told, and where they import from."""

from __future__ import annotations

import base64
import multiprocessing
import os
import pickle
import sys
import threading
from typing import Any


def pack(*job: object) -> str:
    """A job as one word."""
    return base64.b64encode(pickle.dumps(job)).decode()


def unpack(word: str) -> tuple[Any, ...]:
    """The job that ``pack`` was given."""
    return pickle.loads(base64.b64decode(word))


def child_environment(**more: str) -> dict[str, str]:
    """Variables with which a child imports what this process does, and ``more``."""
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path} | more


def end_with_parent() -> None:
    """Let this process of ``multiprocessing`` end when the one that started it does, which a kill cannot tell it."""
    threading.Thread(target=_follow, args=[multiprocessing.parent_process()], daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)
