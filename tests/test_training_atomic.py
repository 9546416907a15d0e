"""What is being written when something fails or the process dies: the old or the new, and no trace."""

from __future__ import annotations

import os

import pytest

from bertkd._files import clear_leftovers, whole_file
from bertkd.training import checkpoint
from bertkd.training.atomic import whole_directory


def replace_dying_at(count: int, end):
    """``os.replace``, but the ``count``-th call is ``end()`` instead."""
    real, calls = os.replace, iter(range(1, 10))
    return lambda *args: end() if next(calls) == count else real(*args)


def filled(path, text: str) -> None:
    with whole_directory(path) as temporary:
        (temporary / "a").write_text(text)


def test_a_failure_while_replacing_puts_the_old_back(tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    filled(tmp_path / "d", "old")
    monkeypatch.setattr(os, "replace", replace_dying_at(2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "d", "new")
    assert os.listdir(tmp_path) == ["d"]
    assert (tmp_path / "d" / "a").read_text() == "old"


def test_a_kill_while_replacing_loses_neither(tmp_path, monkeypatch):
    filled(tmp_path / "d", "old")
    pid = os.fork()
    if pid == 0:
        os.replace = replace_dying_at(2, lambda: os._exit(7))
        filled(tmp_path / "d", "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not (tmp_path / "d").exists()
    busy = tmp_path / f".d.{os.getppid()}.tmp"  # another process's, and that one lives
    busy.mkdir()
    clear_leftovers(tmp_path, "d.")
    assert (tmp_path / "d" / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [busy.name, "d"]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = tmp_path / "results.json"
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"),
        whole_file(path) as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert not os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_leaves_no_trace(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    path = tmp_path / "history.jsonl"
    with whole_file(path) as temporary:
        temporary.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"), whole_file(path) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["history.jsonl"]
    assert path.read_text() == "old"
    # What a kill at that moment leaves.
    (tmp_path / ".history.jsonl.99999999.tmp").write_text("half")
    checkpoint.tidy(tmp_path, resumed=0)
    assert os.listdir(tmp_path) == ["history.jsonl"]
