"""Progress: the time left, and what a terminal, a log and nobody get to see."""

import io

import pytest

from bertkd.study.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_time_left_follows_the_speed_seen():
    now = [0.0]
    phases = {"load": 1, "train": 7, "write": 2}
    progress = Progress(phases, stream=io.StringIO(), clock=lambda: now[0])
    with progress.phase("load"):
        now[0] = 2.0
    with progress.phase("train"):
        # A tenth of the work took 2 s, so nine tenths are expected to take 18 s.
        assert progress.left("train", 0.0) == pytest.approx(18.0)
        # Half of "train" took 21 s: as much again, then 2 of 10 parts at 23 s per 4.5 parts.
        now[0] = 23.0
        assert progress.left("train", 0.5) == pytest.approx(21.0 + 2 * 23.0 / 4.5)


def test_a_log_gets_a_line_now_and_then():
    now, log = [0.0], io.StringIO()
    progress = Progress({"train": 1}, stream=log, interval=10, clock=lambda: now[0])
    with progress.phase("train") as tick:
        for second in range(1, 31):
            now[0] = second
            tick(second / 30, f"step {second}")
    lines = log.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[1] == "[0:10] train  33% step 10 (about 0:20 left)"
    assert "\r" not in log.getvalue()


def test_a_terminal_gets_one_line_rewritten():
    terminal = Terminal()
    progress = Progress({"train": 1}, stream=terminal)
    with progress.phase("train"):
        pass
    assert terminal.getvalue() == "\r\x1b[K[0:00] train   0% (estimating time left)"
    progress.close()
    assert terminal.getvalue().endswith("left)\r\x1b[K")


def test_silent_and_unknown():
    log = io.StringIO()
    progress = Progress({"train": 1}, stream=log, enabled=False)
    with progress.phase("train") as tick:
        tick(0.5)
    progress.close()
    assert log.getvalue() == ""
    with pytest.raises(ValueError, match="unknown phase"), progress.phase("test"):
        pass
