"""Checkpoints: exact, whole or absent, and refused by name and reason when they are not right."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from training_fakes import FakeDistiller, collate, examples, same_state

from bertkd.errors import CheckpointError
from bertkd.training import Stage, checkpoint, verify
from bertkd.training.checkpoint import Contents
from bertkd.training.rng import kept_rng, rng_state, seed_all, set_rng_state
from bertkd.training.schedule import build_optimizer, build_schedule, stage_lengths
from bertkd.training.snapshot import TrainState, check_saveable, restore, restore_model, take

STAGE = Stage(objective="x", steps=20, lr=0.01, warmup=2)
FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "rng.json", "run.json"]
FILES.append("trainer_state.json")


def build(dropout: float = 0.3, seed: int = 0):
    module = FakeDistiller(dropout, seed)
    optimizer = build_optimizer(module, STAGE)
    return module, optimizer, build_schedule(optimizer, STAGE, stage_lengths(STAGE, 5))


def advance(parts, steps: int) -> None:
    module, optimizer, schedule = parts
    batch = collate(examples(8))
    for _ in range(steps):
        module(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def contents_of(parts, state=None) -> Contents:
    return take(*parts, None, state or TrainState(step=3), [rng_state()], {"seed": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints of one run."""
    folder = tmp_path_factory.mktemp("run")
    parts = build()
    for step in (1, 2, 3):
        advance(parts, 1)
        checkpoint.save(folder, step, contents_of(parts))
    return folder


@pytest.fixture
def saved(run, tmp_path):
    """The newest checkpoint in a copy of the run's folder."""
    return shutil.copytree(run, tmp_path / "run") / "checkpoint-3"


def test_a_restored_run_goes_on_bit_by_bit(tmp_path):
    parts = build()
    seed_all(5)
    advance(parts, 4)
    path = checkpoint.save(tmp_path, 4, contents_of(parts, TrainState(step=4, best_metric=0.1)))
    advance(parts, 3)

    seed_all(99)
    others = build(seed=1)
    contents = checkpoint.read(path)
    state = restore(contents, *others, None)
    set_rng_state(contents.documents["rng"]["processes"][0])
    assert (state.step, state.best_metric) == (4, 0.1)
    advance(others, 3)
    assert same_state(parts[0], others[0])
    assert parts[2].get_last_lr() == others[2].get_last_lr()


def test_only_safetensors_and_json_are_written(saved):
    assert sorted(os.listdir(saved)) == sorted(FILES)
    for name in FILES:
        if name.endswith(".json"):
            json.loads((saved / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    reason = "damaged" if name == "manifest.json" else "truncated"
    with pytest.raises(CheckpointError, match=rf"checkpoint-3: {name} is {reason}"):
        checkpoint.read(saved)


@pytest.mark.parametrize("name", FILES[1:])
def test_an_altered_or_missing_file_is_named(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"checkpoint-3: {name} is not what was written"):
        verify(saved)
    (saved / name).write_bytes(content + b" ")
    with pytest.raises(CheckpointError, match=rf"{name} is longer than it was written"):
        verify(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        verify(saved)


def test_foreign_folders_are_refused(tmp_path, saved):
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        verify(tmp_path / "checkpoint-9")
    foreign = tmp_path / "checkpoint-7"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-7: no manifest.json"):
        verify(foreign)
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(CheckpointError, match="format 'other'"):
        verify(saved)
    (saved / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        verify(saved)


def test_the_newest_is_found_and_the_last_good_one_only_when_asked(saved, caplog):
    folder = saved.parent
    assert checkpoint.find(folder, True) == saved
    (saved / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"checkpoint-3: model.safetensors.*'last-good'"):
        checkpoint.find(folder, True)
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        checkpoint.find(folder, str(saved))
    assert checkpoint.find(folder, "last-good") == folder / "checkpoint-2"
    assert "checkpoint-3: model.safetensors is truncated" in caplog.text
    for step in (1, 2):
        (folder / f"checkpoint-{step}" / "run.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is undamaged"):
        checkpoint.find(folder, "last-good")


def test_where_to_start(saved, tmp_path):
    assert checkpoint.find(tmp_path / "new", True) is None
    assert checkpoint.find(tmp_path / "new", False) is None
    with pytest.raises(ValueError, match=r"already holds checkpoint-1.*resume=True"):
        checkpoint.find(saved.parent, False)
    one = saved.parent / "checkpoint-1"
    assert checkpoint.find(saved.parent, one) == one
    shutil.copytree(one, tmp_path / "elsewhere" / "checkpoint-1")
    with pytest.raises(ValueError, match="is no checkpoint of output_dir"):
        checkpoint.find(saved.parent, tmp_path / "elsewhere" / "checkpoint-1")


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert list(checkpoint.checkpoints(tmp_path)) == [9, 10, 100]


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, best=5)
    assert list(checkpoint.checkpoints(tmp_path)) == [5, 15, 20]
    checkpoint.prune(tmp_path, keep_last=1, best=None)
    assert list(checkpoint.checkpoints(tmp_path)) == [20]


@pytest.mark.parametrize("moment", ["save_file", "fsync", "replace"])
def test_a_failure_while_saving_leaves_the_old_and_no_trace(saved, monkeypatch, moment):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint if moment == "save_file" else os, moment, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(saved.parent, 4, contents_of(build()))
    monkeypatch.undo()
    assert sorted(os.listdir(saved.parent)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert checkpoint.find(saved.parent, True) == saved


def test_a_kill_while_saving_leaves_the_old_and_is_cleared_up(saved, monkeypatch):
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "replace", lambda *args: os._exit(7))
        checkpoint.save(saved.parent, 4, contents_of(build()))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(os.listdir(saved.parent)) == 4
    assert checkpoint.find(saved.parent, True) == saved
    checkpoint.tidy(saved.parent, resumed=3)
    assert sorted(os.listdir(saved.parent)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_an_older_start_sets_newer_checkpoints_aside(saved):
    checkpoint.tidy(saved.parent, resumed=1)
    assert list(checkpoint.checkpoints(saved.parent)) == [1]
    verify(saved.parent / "discarded-checkpoint-3")


def test_weights_of_another_model_are_listed(saved):
    module = FakeDistiller()
    module.student.layer = nn.Linear(8, 4)
    module.student.extra = nn.Linear(2, 2)
    message = r"student.extra.bias: missing in the checkpoint.*layer.weight: \(8, 8\).*\(4, 8\)"
    with pytest.raises(CheckpointError, match=message):
        restore_model(checkpoint.read(saved), module)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def tied():
        module = FakeDistiller()
        module.student.decoder = nn.Linear(8, 20, bias=False)
        module.student.decoder.weight = module.student.embed.weight
        optimizer = build_optimizer(module, STAGE)
        return module, optimizer, build_schedule(optimizer, STAGE, stage_lengths(STAGE, 5))

    parts, others = tied(), tied()
    advance(parts, 2)
    path = checkpoint.save(tmp_path, 2, contents_of(parts))
    contents = checkpoint.read(path)
    assert "student.decoder.weight" not in contents.tensors["model"]
    restore(contents, *others, None)
    assert same_state(parts[0], others[0])
    assert others[0].student.decoder.weight is others[0].student.embed.weight


def test_extra_state_is_kept_if_it_is_a_tensor_and_refused_otherwise(tmp_path):
    class Drawing(FakeDistiller):
        def __init__(self, extra):
            super().__init__()
            self.extra = extra

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    module = Drawing(torch.Generator().manual_seed(3).get_state())
    optimizer = build_optimizer(module, STAGE)
    schedule = build_schedule(optimizer, STAGE, stage_lengths(STAGE, 5))
    path = checkpoint.save(tmp_path, 1, contents_of((module, optimizer, schedule)))
    other = Drawing(torch.Generator().manual_seed(4).get_state())
    restore_model(checkpoint.read(path), other)
    assert torch.equal(other.extra, module.extra)
    with pytest.raises(TypeError, match="_extra_state is something else"):
        check_saveable(Drawing({"a": 1}))


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(2)


def test_generators_go_on_where_they_were_after_json():
    seed_all(1)
    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    seed_all(2)
    set_rng_state(state)
    assert [str(x) for x in draw()] == [str(x) for x in expected]


@pytest.mark.parametrize("seed", [None, 7])
def test_kept_rng_leaves_no_trace(seed):
    seed_all(1)
    expected = draw()
    seed_all(1)
    with kept_rng(seed):
        first = draw()
    assert [str(x) for x in draw()] == [str(x) for x in expected]
    assert (str(first) == str(expected)) == (seed is None)
    if seed is not None:
        with kept_rng(seed):
            assert str(draw()) == str(first)


@pytest.mark.parametrize(
    "damage",
    [
        lambda files: files["run.json"].pop("bytes"),
        lambda files: files.update({"run.json": 3}),
        lambda files: files.pop("run.json"),
    ],
)
def test_a_damaged_manifest_is_skipped_like_any_damage(saved, damage):
    manifest = json.loads((saved / "manifest.json").read_text())
    damage(manifest["files"])
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"checkpoint-3: manifest\.json"):
        checkpoint.read(saved)
    assert checkpoint.find(saved.parent, "last-good") == saved.parent / "checkpoint-2"
    for other in ({"version": "one"}, {"files": []}):
        (saved / "manifest.json").write_text(json.dumps(manifest | other))
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            verify(saved)


def test_a_full_disk_is_said_with_what_to_do(saved, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    message = r"checkpoint-4 could not be written \(I/O error: No space.*resume=True goes on"
    with pytest.raises(OSError, match=message):
        checkpoint.save(saved.parent, 4, contents_of(build()))


def test_what_resume_may_be(tmp_path):
    for wrong in (None, 1):
        with pytest.raises(TypeError, match=rf"resume must be True, False.*got {wrong}"):
            checkpoint.find(tmp_path, wrong)


def test_other_weights_frozen_or_trained_are_refused(tmp_path):
    def frozen(name):
        module = FakeDistiller()
        module.student.get_submodule(name).requires_grad_(False)
        optimizer = build_optimizer(module, STAGE)
        return module, optimizer, build_schedule(optimizer, STAGE, stage_lengths(STAGE, 5))

    parts = frozen("head")
    advance(parts, 1)
    contents = checkpoint.read(checkpoint.save(tmp_path, 1, contents_of(parts)))
    restore(contents, *frozen("head"), None)
    message = r"other weights frozen or trained: student\.embed\.weight, student\.head\.bias"
    with pytest.raises(CheckpointError, match=message):
        restore(contents, *frozen("embed"), None)
