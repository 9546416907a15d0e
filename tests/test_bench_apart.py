"""Cases of a benchmark in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from other_run import other_run_in

from bertkd.bench import ddp, runner
from bertkd.bench.cases import attention
from bertkd.bench.op_cases import Settings
from bertkd.bench.selection import Selection

SMALL = attention("relation_kl", (4, 3, 20, 8), "float32", padding="glue")
SETTINGS = Settings(
    torch.device("cpu"), Selection(), ("eager", "chunked"), rounds=3, seconds=0.1, weigh=False
)


def process(*_):
    return [os.getpid(), torch.get_num_threads()]


def die(*_):
    os._exit(3)


def linger(*_):
    print(os.getpid(), flush=True)
    time.sleep(60)


def test_a_case_is_measured_in_another_process(monkeypatch):
    rows = runner.measured_apart(SMALL, SETTINGS)
    assert {row.impl for row in rows} == {"eager", "chunked"}
    assert {row.status for row in rows} == {"ok"}
    assert runner.measured_apart(SMALL, SETTINGS)[0].group == rows[0].group
    monkeypatch.setattr(runner, "_rows_of", process)
    first, second = (runner.measured_apart(SMALL, SETTINGS) for _ in range(2))
    assert len({first[0], second[0], os.getpid()}) == 3


def test_a_process_that_dies_costs_its_case_alone(monkeypatch):
    monkeypatch.setattr(runner, "_rows_of", die)
    (row,) = runner.measured_apart(SMALL, SETTINGS)
    assert row.status == "error"
    assert "terminated abruptly" in row.note


def test_a_folder_that_another_run_measures_into_is_refused(tmp_path):
    job = runner.plan(runner.Options("relation_kl", "cpu", str(tmp_path / "out")))
    with other_run_in(tmp_path / "out", "bench"), pytest.raises(ValueError, match="is in use by"):
        runner.run(job)
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_killed_run_leaves_no_process_behind():
    """A case that is measured on would spoil the next run's times; then it waited for another one, for ever."""
    run = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    case = int(run.stdout.readline())
    run.kill()
    try:
        run.communicate(timeout=10)  # until the last process has closed what it would write to
    finally:
        with suppress(ProcessLookupError):
            os.kill(case, signal.SIGKILL)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("exec sleep 60", "echo no memory >&2; exit 3", "no memory"),
        ("echo no memory >&2; exit 3", "exec sleep 60", "no memory"),
        ("exec sleep 60", "exit 3", "exit code 3"),
        ("exec sleep 60", "exec sleep 60", "no answer within 1 s"),
    ],
)
def test_processes_that_train_together_end_together(first, second, said, tmp_path, monkeypatch):
    """The others would wait for one that is gone; it says why, not they."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nif [ $RANK = 0 ]; then {first}; fi\n{second}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(ddp, "SECONDS", 1 if "within" in said else 30)
    started = time.monotonic()
    (row,) = ddp.run_ddp(ddp.ddp_cases_for("cpu")[1], SETTINGS)
    assert (row.status, row.note) == ("error", said)
    assert time.monotonic() - started < 20


if __name__ == "__main__":
    runner._rows_of = linger
    runner.measured_apart(SMALL, SETTINGS)
