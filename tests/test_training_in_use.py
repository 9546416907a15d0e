"""One run to a folder: who comes second is refused, and a run that was killed holds nobody up."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from test_training_ddp import finish, start_two
from training_fakes import FakeDistiller, collate, examples

from bertkd.training import Stage, checkpoint, train
from bertkd.training.in_use import LOCK

STAGE = Stage(objective="x", steps=3, batch_size=6, eval_every=1, save_every=1, metric="accuracy")


def run(folder: Path, eval_fn, **options):
    settings = {"collate": collate, "log_with": None, "progress": False, **options}
    return train(
        FakeDistiller(), STAGE, examples(12), output_dir=folder, eval_fn=eval_fn, **settings
    )


def accuracy(student):
    return {"accuracy": 0.5}


def test_a_second_run_is_refused_and_harms_nothing(tmp_path):
    # A process of its own, as locks do not keep a process from itself.
    command = [sys.executable, __file__, tmp_path]

    def start_another(student):
        said.append(subprocess.check_output(command, text=True).strip())
        return accuracy(student)

    said: list[str] = []
    result = run(tmp_path, start_another)
    assert set(said) == {
        f"output_dir {str(tmp_path)!r} is in use by another run (process {os.getpid()} on "
        f"{os.uname().nodename}): wait for its end, or name another place"
    }
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == len(result.history)
    assert not list(tmp_path.glob(".*"))
    assert run(tmp_path, accuracy, resume=True).steps == 3


def test_the_checkpoint_to_go_on_from_is_looked_for_under_the_lock(tmp_path, monkeypatch):
    find, held = checkpoint.find, []

    def look(*words):
        held.append((tmp_path / LOCK).exists())
        return find(*words)

    monkeypatch.setattr(checkpoint, "find", look)
    run(tmp_path, accuracy)
    assert held == [True]


def test_a_killed_run_holds_nobody_up_though_its_children_live(tmp_path):
    victim = subprocess.run(
        [sys.executable, __file__, tmp_path, "die"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert victim.returncode == -signal.SIGKILL
        assert (tmp_path / LOCK).exists()
        assert run(tmp_path, accuracy, resume=True).steps == 3
        assert not (tmp_path / LOCK).exists()
    finally:
        os.kill(int(victim.stdout), signal.SIGKILL)


def test_a_holder_that_ends_between_opening_and_locking_takes_its_file_along(tmp_path, monkeypatch):
    lock, calls = fcntl.lockf, []

    def late(*words):
        calls.append(words)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lock(*words)

    monkeypatch.setattr(fcntl, "lockf", late)
    run(tmp_path, lambda student: {"accuracy": float((tmp_path / LOCK).exists())})
    assert len(calls) == 2


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def fail(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    assert run(tmp_path, accuracy).steps == 3
    assert "has no locks (No locks available): start no second run in it" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    def fail(*words, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ValueError, match=r"output_dir '.*new' cannot be written to \(Read-only"):
        run(tmp_path / "new", accuracy)


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/run", "link"):
        with pytest.raises(ValueError, match=rf"output_dir '.*{place}' cannot be a folder: it is"):
            run(tmp_path / place, accuracy)


@pytest.mark.slow
def test_all_processes_of_a_run_are_told(tmp_path):
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open("w") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        printed = finish(start_two(__file__, tmp_path))
    assert all("is in use by another run" in text for text in printed), printed


def die(student):
    """Leave a child behind, as a worker that fetches batches would be."""
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    os.write(1, str(child).encode())
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), die if "die" in sys.argv else accuracy, resume=True)
    except ValueError as error:
        print(error)
    if dist.is_initialized():  # else the interpreter's end may abort a process
        dist.destroy_process_group()
