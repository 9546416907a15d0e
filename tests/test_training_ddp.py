"""Two processes with DDP train as one does on the joint batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runs import FAST, save_place
from transformers import AutoModelForSequenceClassification

from bertkd.training import checkpoint, machine
from bertkd.training.machine import this_process


def start(*words: str | Path, **settings) -> subprocess.Popen:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in settings.items()}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def start_two(*words: str | Path) -> list[subprocess.Popen]:
    """As ``torchrun --nproc_per_node 2`` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [start(*words, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(2)]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each has printed, once all have ended with ``code``."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [code] * len(processes)
    finally:
        for process in processes:
            process.kill()
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``together/`` from two processes, ``alone/`` from one."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("training_two_processes.py")
    finish([*start_two(script, folder), start(script, folder)])
    return folder


def last_of(stage: Path) -> checkpoint.Contents:
    found = checkpoint.checkpoints(stage)
    return checkpoint.read(found[max(found)])


@pytest.mark.parametrize("stage", ["1-one", "2-two"])
def test_two_processes_equal_one_on_the_joint_batch(folder, stage):
    theirs, ours = last_of(folder / "together" / stage), last_of(folder / "alone" / stage)
    assert theirs.documents["run"]["processes"] == 2
    assert ours.documents["run"]["processes"] == 1
    for file in ("model", "optimizer"):  # the first moments are the gradients' means
        assert theirs.tensors[file].keys() == ours.tensors[file].keys()
        for name, tensor in ours.tensors[file].items():
            if name != "seen":  # counts the batches of one process
                torch.testing.assert_close(theirs.tensors[file][name], tensor, rtol=1e-5, atol=1e-7)
    rows = [c.documents["trainer_state"]["state"]["history"] for c in (theirs, ours)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for their_row, our_row in zip(*rows, strict=True):
        for key in our_row.keys() - {"seconds", "examples_per_second"}:
            assert their_row[key] == pytest.approx(our_row[key], rel=1e-4), key


def test_the_work_was_shared_and_did_something(folder):
    one, two = last_of(folder / "together" / "1-one"), last_of(folder / "together" / "2-two")
    # One process passes 1 batch per update of the first stage, 2 of the second.
    assert (int(one.tensors["model"]["seen"]), int(two.tensors["model"]["seen"])) == (5, 5 + 12)
    for name, tensor in one.tensors["model"].items():
        assert torch.equal(tensor, two.tensors["model"][name]) == ("unused" in name), name


# What the launcher sees of a process: a group that is left to the interpreter's end may abort it.
COMMAND_LINE = """
import sys, torch.distributed
from bertkd.cli.main import main
code = main(sys.argv[1:])
assert not torch.distributed.is_initialized()
sys.exit(code)
"""


@pytest.mark.slow
def test_the_command_line_shares_its_work_among_processes(tmp_path):
    """Contrast with the bank, and a last batch that does not divide, on top."""
    place = save_place(tmp_path)
    command = ["-c", COMMAND_LINE, "distill"]
    command += ["--task", place["task"], "--teacher", place["teacher"]]
    command += [*FAST, "--output_dir", tmp_path / "run", "--layers", "uniform:2", "--steps", "3"]
    command += ["--batch_size", "21", "--objective", "hid_cls_contrast + kd"]
    first, second = finish(start_two(*command))
    assert first.count("stage 1 of 1") == 1
    assert second == ""
    assert last_of(tmp_path / "run" / "1-distil").documents["run"]["processes"] == 2
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_a_command_that_is_refused_leaves_its_process_group_too(tmp_path):
    finish(start_two("-c", COMMAND_LINE, "demo", "--output_dir", tmp_path), code=2)


def test_processes_meet_once_all_can_be_reached(monkeypatch):
    """One that ends at once would take along the others, where these are still connecting to it."""
    meetings = []
    group = SimpleNamespace(backend="gloo", wait_for_everyone=lambda: meetings.append(1))
    monkeypatch.setattr(machine, "PartialState", lambda cpu: group)
    this_process()
    assert meetings == [1]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    this_process()
    assert meetings == [1]
