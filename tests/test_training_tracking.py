"""What a run tells: its history, trackers and progress."""

from __future__ import annotations

import errno
import json
import logging
import sys
from types import SimpleNamespace

import pytest
from training_fakes import FakeDistiller, examples, run

from bertkd.errors import CheckpointError
from bertkd.training.tracking import History

pytestmark = pytest.mark.usefixtures("on_cpu")


def test_a_torn_history_is_mended_on_resume(tmp_path):
    settings = {"save_every": 4, "keep_last": 9, "steps": 9, "log_every": 3}
    _, whole = run(tmp_path, **settings)
    folder = tmp_path / "run"
    for step in (8, 9):
        (folder / f"checkpoint-{step}" / "run.json").unlink()
    with (folder / "history.jsonl").open("a") as stream:
        stream.write('{"step": 12, "lo')
    with pytest.raises(CheckpointError, match="checkpoint-9"):
        run(tmp_path, resume=True, **settings)
    _, again = run(tmp_path, resume="last-good", **settings)
    timed = ("seconds", "examples_per_second")
    strip = [
        [{k: v for k, v in r.items() if k not in timed} for r in x.history] for x in (whole, again)
    ]
    assert strip[0] == strip[1]
    lines = (folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9]


def test_a_full_disk_is_told_with_what_could_not_be_written(tmp_path):
    def log(numbers, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "history.jsonl"
    history = History(SimpleNamespace(is_main_process=True, log=log), path, [])
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
        history.add({"step": 1})
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        history.add({"step": 2})


def test_trackers(tmp_path, monkeypatch, caplog):
    run(tmp_path, log_with="tensorboard", log_every=3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "logs" / "bertkd")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9]
    with pytest.raises(
        ValueError, match=r"unknown tracker 'tensorbord'\. Did you mean 'tensorboard'"
    ):
        run(tmp_path / "b", log_with="tensorbord")
    for name in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="log_with='wandb'"):
        run(tmp_path / "c", log_with="wandb")
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "d", log_with="tensorboard")
    assert "tensorboard is not installed" in caplog.text
    assert (tmp_path / "d" / "run" / "history.jsonl").exists()


def test_tensorboard_forgets_what_was_lost_before_the_first_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Interrupted(FakeDistiller):
        def forward(self, batch):
            if int(self.seen) == 3:
                raise KeyboardInterrupt
            return super().forward(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(), log_with="tensorboard")
    run(tmp_path, log_with="tensorboard", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "bertkd")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_all_trackers_are_those_that_are_installed(tmp_path):
    run(tmp_path, log_with="all")
    assert (tmp_path / "run" / "logs" / "bertkd").is_dir()


def test_examples_per_second_count_examples_and_training_only(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bertkd.training.tracking.time.perf_counter", lambda: now[0])

    class Slow(FakeDistiller):
        def forward(self, batch):
            now[0] += 0.25
            return super().forward(batch)

    def evaluate(student):
        now[0] += 100
        return {"accuracy": 1.0}

    # 20 examples are updates of 8, 8 and 4, in two micro-batches each.
    settings = {"data": examples(20), "epochs": 1, "accumulate": 2, "save_every": 1}
    _, every = run(tmp_path / "a", Slow(), eval_fn=evaluate, eval_every=1, **settings)
    rates = [row["examples_per_second"] for row in every.history if "loss" in row]
    assert sorted(rates) == [8.0, 16.0, 16.0]
    assert every.history[-2]["seconds"] == 201.5
    _, few = run(tmp_path / "b", Slow(), log_every=3, **settings)
    assert few.history[0]["examples_per_second"] == pytest.approx(20 / 1.5)


def test_progress_shows_terms_and_steps(tmp_path, capsys):
    run(tmp_path, progress=True, name="mine")
    shown = capsys.readouterr().err
    assert "mine: 100%" in shown
    assert "mse=" in shown
    assert "9/9" in shown
