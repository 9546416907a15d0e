"""Output folders: which are taken, which are refused, and who holds one."""

import json
import os
from pathlib import Path

import pytest
from other_run import other_run_in

from bertkd.study.files import (
    check_output_dir,
    claim_output_dir,
    held_output_dir,
    write_json,
    write_through,
)


def test_a_new_and_an_empty_directory_are_taken(tmp_path):
    claim_output_dir(tmp_path / "a" / "b", "distill")
    assert (
        json.loads((tmp_path / "a" / "b" / "bertkd_run.json").read_text())["command"] == "distill"
    )
    (tmp_path / "empty").mkdir()
    claim_output_dir(tmp_path / "empty", "demo")


def test_foreign_directories_are_never_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for reuse in (False, True):
        with pytest.raises(ValueError, match="not made by bertkd"):
            claim_output_dir(tmp_path, "distill", reuse=reuse)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        claim_output_dir(tmp_path / "thesis.tex", "distill")
    with pytest.raises(ValueError, match=r"cannot be created: '.*thesis.tex' is a file"):
        check_output_dir(tmp_path / "thesis.tex" / "run", "distill")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a link to nowhere"):
        check_output_dir(tmp_path / "link", "distill")


def test_an_earlier_run_is_taken_only_when_asked_and_by_its_own_command(tmp_path):
    claim_output_dir(tmp_path, "distill")
    (tmp_path / "1-distil").mkdir()
    with pytest.raises(ValueError, match="--resume"):
        check_output_dir(tmp_path, "distill")
    with pytest.raises(ValueError, match="bertkd distill"):
        check_output_dir(tmp_path, "finetune", reuse=True)
    claim_output_dir(tmp_path, "distill", reuse=True)


def test_a_folder_is_tried_without_a_trace_even_while_others_try_it(tmp_path):
    check_output_dir(tmp_path / "a" / "b", "distill")
    assert not any(tmp_path.iterdir())
    (tmp_path / ".bertkd-trial-of-another-process").mkdir()
    check_output_dir(tmp_path, "distill")


def test_a_name_that_libraries_cannot_write_is_refused_before_the_training(tmp_path):
    """As of an archive from Windows, or any but plain letters where the locale is not UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for path in (folder, folder / "run"):
        with pytest.raises(ValueError, match=r"caf\\udce9.*' is not UTF-8.*name another place"):
            check_output_dir(path, "distill")
    check_output_dir(tmp_path / "café 日本", "distill")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_where_not_even_root_can_write():
    with pytest.raises(ValueError, match=r"'/proc/a/b' cannot be created: '/proc' cannot be wri"):
        check_output_dir("/proc/a/b", "distill")


def test_a_folder_is_held_by_one_run_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "out"
    with (
        other_run_in(folder, "demo"),
        pytest.raises(
            ValueError, match=r"out' is in use by another run \(process \d+ on .*\): wait"
        ),
        held_output_dir(folder, "demo"),
    ):
        pass
    with held_output_dir(folder, "demo") as held:
        assert held == folder
    assert [path.name for path in folder.iterdir()] == ["bertkd_run.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = write_json(tmp_path / "results.json", {"mrr": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"mrr": float("nan")})

    def half(temporary):
        temporary.write_text("{")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_through(path, half)
    assert json.loads(path.read_text()) == {"mrr": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(
        ValueError, match=r"output_dir '.*run' cannot be written to \(No space left"
    ):
        claim_output_dir(tmp_path / "run", "distill")
    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(ValueError, match=r"cannot be created: .* cannot be written to \(No space"):
        check_output_dir(tmp_path / "run", "distill")
    with pytest.raises(ValueError, match=r"output_dir '.*' cannot be written to \(No space"):
        check_output_dir(tmp_path, "distill")


def test_what_kills_left_half_written_is_cleared_up(tmp_path):
    """A folder that was never signed is no stranger's; what another process writes just now stays."""
    half = [
        tmp_path / ".bertkd_run.json.4194305.tmp",
        tmp_path / "seed-1" / ".loss.png.4194305.tmp",
    ]
    half[0].write_text("{")
    claim_output_dir(tmp_path, "demo")
    (tmp_path / "seed-1").mkdir()
    half[1].write_text("half a picture")
    living = tmp_path / f".results.json.{os.getppid()}.tmp"
    living.write_text("{")
    with held_output_dir(tmp_path, "demo"):
        assert living.exists()
        assert not any(path.exists() for path in half)
