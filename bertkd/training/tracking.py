"""The history of a run: ``history.jsonl``, and the same rows to the trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bertkd._files import naming, whole_file


class History:
    """Rows of numbers with a ``step`` each; the main process writes them.

    Args:
        accelerator: of the run; its trackers get every row.
        path: the JSON-lines file. It is rewritten with ``rows``: the file of a killed run may be
            ahead of the checkpoint, or end in half a line.
        rows: those the checkpoint holds; the list grows in place.
    """

    def __init__(self, accelerator: Accelerator, path: Path, rows: list[dict[str, Any]]) -> None:
        self.accelerator = accelerator
        self.path = path
        self.rows = rows
        if accelerator.is_main_process:
            with whole_file(path) as temporary:
                text = "".join(json.dumps(row) + "\n" for row in rows)
                temporary.write_text(text, encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; a value that is not finite becomes null."""
        row = {key: finite(value) for key, value in row.items()}
        self.rows.append(row)
        if self.accelerator.is_main_process:
            with naming(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            numbers = {k: v for k, v in row.items() if k != "step" and v is not None}
            with naming(self.path.parent):
                self.accelerator.log(numbers, step=row["step"])


class Stopwatch:
    """Seconds over all sittings, and examples per second since the last look.

    Args:
        earlier: seconds of earlier sittings.
    """

    def __init__(self, earlier: float) -> None:
        self._last = time.perf_counter()
        self._start = self._last - earlier
        self._examples = 0

    def seconds(self) -> float:
        """Time spent so far."""
        return time.perf_counter() - self._start

    def count(self, examples: int) -> None:
        """Note an update on so many examples."""
        self._examples += examples

    def rate(self) -> float:
        """Examples per second since the last call."""
        now = time.perf_counter()
        rate = self._examples / (now - self._last)
        self._last, self._examples = now, 0
        return rate

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside takes time, but is no training: ``rate`` leaves it out."""
        before = time.perf_counter()
        yield
        self._last += time.perf_counter() - before


def finite(value: Any) -> Any:
    """``value``, or None where it is a NaN or an infinity, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
