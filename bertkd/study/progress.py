"""Progress of a run of several phases, with the time left, on terminals and in log files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from bertkd.study.table import human_time

Tick = Callable[..., None]


class Progress:
    """Say what runs, how far the whole run is, and how long it will still take.

    A terminal gets one line that is rewritten; anything else (a file, a pipe, a CI log) gets a line
    at the start of each phase and then one every ``interval`` seconds.

    Args:
        phases: phase name -> expected cost in any common unit (seconds on some machine, say). The
            first estimate follows these; it is corrected by the speed seen so far.
        stream: where to write; stderr by default, so that results on stdout stay clean.
        interval: seconds between lines when ``stream`` is not a terminal.
        enabled: False keeps silent, e.g. on all processes but the first.
        clock: seconds since some moment; for tests.
    """

    def __init__(
        self,
        phases: Mapping[str, float],
        *,
        stream: TextIO | None = None,
        interval: float = 10.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phases = dict(phases)
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else interval
        self._enabled = enabled
        self._clock = clock
        self._start = self._began = clock()
        self._shown = float("-inf")
        self._done = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[Tick]:
        """Run one phase; the value is ``tick(fraction, note="")``, to call as the phase goes on.

        Raises:
            ValueError: ``name`` is not among the phases.
        """
        if name not in self.phases:
            raise ValueError(f"unknown phase {name!r}; known: {', '.join(self.phases)}.")
        self._began = self._clock()

        def tick(fraction: float, note: str = "") -> None:
            self._show(name, fraction, note)

        self._show(name, 0.0, "", force=True)
        yield tick
        self._done += self.phases[name]

    def close(self) -> None:
        """Take the progress line away."""
        if self._enabled:
            self._clear()

    def left(self, name: str, fraction: float) -> float:
        """Estimated seconds until the whole run is over; NaN when nothing is known yet.

        The present phase goes on at its own speed once that shows, the later ones at the average
        speed so far.
        """
        now = self._clock()
        cost, done = self.phases[name], self._done + self.phases[name] * fraction
        if done <= 0:
            return float("nan")
        pace = (now - self._start) / done
        own = (now - self._began) / fraction if fraction > 0.02 else cost * pace
        later = sum(self.phases.values()) - self._done - cost
        return own * (1 - fraction) + later * pace

    def _show(self, name: str, fraction: float, note: str, *, force: bool = False) -> None:
        now = self._clock()
        if not self._enabled or (now - self._shown < self._interval and not force):
            return
        self._shown = now
        left = self.left(name, fraction)
        eta = f"about {human_time(left)} left" if left == left else "estimating time left"
        parts = [f"[{human_time(now - self._start)}]", f"{name} {fraction:4.0%}", note, f"({eta})"]
        line = " ".join(part for part in parts if part)
        if self._terminal:
            self._clear()
            self._stream.write(line)
            self._stream.flush()
        else:
            print(line, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
