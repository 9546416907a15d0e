"""The training loop against a hand-written one, and what it does when something goes wrong."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from training_fakes import FakeDistiller, Output, collate, examples, run, same_state

from bertkd.data import LengthBucketSampler
from bertkd.errors import CheckpointError, NonFiniteError
from bertkd.training import checkpoint, make_accelerator, run_record
from bertkd.training.meter import Meter

pytestmark = pytest.mark.usefixtures("on_cpu")


def test_equals_a_hand_written_loop(tmp_path):
    data = examples(20)  # three updates per epoch, the last of four examples
    module, result = run(
        tmp_path,
        data=data,
        epochs=3,
        warmup=2,
        weight_decay=0.3,
        max_grad_norm=0.5,
        betas=(0.8, 0.9),
    )

    by_hand = FakeDistiller()
    matrices = [p for p in by_hand.student.parameters() if p.ndim == 2]
    vectors = [p for p in by_hand.student.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.9))
    sampler = LengthBucketSampler([len(x["input_ids"]) for x in data], 8, seed=3)
    step = 0
    for _ in range(3):
        for rows in sampler:
            rate = 0.02 * min(step / 2, (9 - step) / (9 - 2))
            for group in optimizer.param_groups:
                group["lr"] = rate
            output = by_hand(collate([data[row] for row in rows]))
            optimizer.zero_grad()
            output.loss.backward()
            norm = nn.utils.clip_grad_norm_([*matrices, *vectors], 0.5)
            optimizer.step()
            row = result.history[step]
            step += 1
            assert (row["step"], row["epoch"]) == (step, step / 3)
            assert row["lr"] == pytest.approx(rate)
            assert row["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
            assert row["mse"] == pytest.approx(output.terms["mse"].item(), rel=1e-5)
            assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert step == result.steps == len(result.history)
    for ours, theirs in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(module.student.head.weight, FakeDistiller().student.head.weight)


@pytest.mark.parametrize(
    ("schedule", "extra", "at_half"),
    [
        ("constant", {}, 1.0),
        ("linear", {}, 0.5),
        ("cosine", {}, 0.5),
        ("polynomial", {"power": 2.0, "lr_end": 0.002}, 0.9 * 0.25 + 0.1),
    ],
)
def test_schedules(tmp_path, schedule, extra, at_half):
    _, result = run(tmp_path, schedule=schedule, steps=12, warmup=2, **extra)
    rates = [row["lr"] / 0.02 for row in result.history]
    assert rates[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert rates[7] == pytest.approx(at_half)


def test_accumulation_gives_the_gradient_of_the_undivided_batch(tmp_path):
    data = examples(19)  # the last update of an epoch has three examples for four micro-batches
    whole, _ = run(tmp_path / "a", data=data, epochs=2)
    parts, result = run(tmp_path / "b", data=data, epochs=2, accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert result.steps == 6


def test_losses_are_means_over_the_rows_of_the_history(tmp_path):
    _, every = run(tmp_path / "a", steps=9)
    module, few = run(tmp_path / "b", steps=9, log_every=4)
    assert [row["step"] for row in few.history] == [4, 8, 9]
    mean = sum(row["loss"] for row in every.history[:4]) / 4
    assert few.history[0]["loss"] == pytest.approx(mean)
    on_disk = (tmp_path / "b" / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in on_disk] == few.history
    assert not module.training


def test_what_every_step_warns_of_is_shown_once(tmp_path):
    class Grumbling(FakeDistiller):
        def forward(self, batch):
            warnings.warn("at every step", stacklevel=1)
            return super().forward(batch)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        run(tmp_path, Grumbling(), steps=3)
    assert [str(w.message) for w in shown].count("at every step") == 1


def test_the_teacher_is_frozen_in_eval_and_not_optimised(tmp_path):
    module = FakeDistiller()
    before = [p.clone() for p in module.teacher.parameters()]
    _, result = run(tmp_path, module)
    assert all(torch.equal(p, q) for p, q in zip(before, module.teacher.parameters(), strict=True))
    assert all(p.grad is None for p in module.teacher.parameters())
    assert not any(part.training for part in module.teacher.modules())
    contents = checkpoint.read(result.last_checkpoint)
    for names in contents.tensors.values():
        assert all(name.startswith("student.") or name == "seen" for name in names)

    module.student.teacher_by_mistake = module.teacher.requires_grad_(True)
    with pytest.raises(ValueError, match="teacher's weights are among those to be trained"):
        run(tmp_path / "again", module)


def scores(*values):
    """An evaluation that gives ``values`` one after the other and draws random numbers."""
    left = list(values)

    def evaluate(student):
        assert not student.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        np.random.rand()
        return {"accuracy": left.pop(0), "other": math.nan}

    return evaluate


def test_the_best_weights_come_back_and_patience_stops(tmp_path, caplog):
    module, result = run(
        tmp_path,
        eval_fn=scores(0.3, 0.5, 0.5, 0.4, 0.9),
        metric="accuracy",
        eval_every=2,
        patience=2,
        steps=20,
        keep_last=1,
    )
    assert (result.steps, result.stopped_early) == (8, True)
    assert (result.best_metric, result.best_step) == (0.5, 4)
    assert result.metrics == {"accuracy": 0.4, "other": None}
    assert "no better" not in caplog.text  # of the metric that does not count
    folder = tmp_path / "run"
    assert list(checkpoint.checkpoints(folder)) == [4, 8]
    assert result.best_checkpoint == folder / "checkpoint-4"
    best = checkpoint.read(result.best_checkpoint).tensors["model"]
    assert all(torch.equal(best[name], value) for name, value in module.state_dict().items())
    assert [r["eval_accuracy"] for r in result.history if "eval_accuracy" in r] == [
        0.3,
        0.5,
        0.5,
        0.4,
    ]

    module, result = run(
        tmp_path / "b",
        eval_fn=scores(0.5, 0.3, math.nan),
        metric="accuracy",
        maximize=False,
        eval_every=2,
        steps=6,
        restore="last",
    )
    assert (result.best_metric, result.best_step, result.steps) == (0.3, 4, 6)
    assert "step 6: accuracy is nan, which counts as no better than before" in caplog.text
    last = checkpoint.read(result.last_checkpoint).tensors["model"]
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())


def test_a_run_whose_best_checkpoint_is_damaged_can_end_with_its_last_weights(tmp_path):
    options = {"metric": "accuracy", "eval_every": 2, "steps": 6}
    _, result = run(tmp_path, eval_fn=scores(0.5, 0.3, 0.2), **options)
    assert result.best_step == 2
    (result.best_checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing.*--restore last"):
        run(tmp_path, eval_fn=scores(0.2), resume=True, **options)
    module, result = run(tmp_path, eval_fn=scores(0.2), resume=True, restore="last", **options)
    last = checkpoint.read(result.last_checkpoint).tensors["model"]
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())


def test_evaluation_leaves_no_trace_in_the_training(tmp_path):
    plain, _ = run(tmp_path / "a", FakeDistiller(dropout=0.3))
    watched, _ = run(
        tmp_path / "b", FakeDistiller(dropout=0.3), eval_fn=scores(*[0.1] * 9), eval_every=1
    )
    assert same_state(plain, watched)


def test_a_failing_evaluation_does_not_lose_the_training(tmp_path):
    def fail(student):
        raise RuntimeError("no such metric file")

    settings = {"eval_every": 4, "metric": "accuracy", "steps": 8, "save_every": None}
    with pytest.raises(RuntimeError, match="no such metric file"):
        run(tmp_path, FakeDistiller(dropout=0.3), eval_fn=fail, **settings)
    resumed, result = run(
        tmp_path, FakeDistiller(dropout=0.3), eval_fn=scores(0.2, 0.1), resume=True, **settings
    )
    assert [row["step"] for row in result.history if "eval_accuracy" in row] == [4, 8]
    straight, _ = run(
        tmp_path / "b", FakeDistiller(dropout=0.3), eval_fn=scores(0.2, 0.1), **settings
    )
    assert same_state(resumed, straight)
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'"):
        run(tmp_path / "c", eval_fn=scores(0.2), **settings | {"metric": "acuracy"})


def test_a_student_that_overtakes_its_teacher_is_pointed_out(tmp_path, caplog):
    options = {"metric": "accuracy", "eval_every": 2, "steps": 8}
    run(tmp_path, eval_fn=scores(0.5, 0.7, 0.8, 0.6), teacher_score=0.6, **options)
    warned = [r.getMessage() for r in caplog.records if "overtakes" in r.getMessage()]
    assert len(warned) == 1
    assert "step 4" in warned[0]
    assert "0.7" in warned[0]
    caplog.clear()
    run(tmp_path / "b", eval_fn=scores(0.5, 0.6, 0.6, 0.6), teacher_score=0.6, **options)
    assert "overtakes" not in caplog.text


class Breaking(FakeDistiller):
    """Gives a NaN term at its ``at``-th batch; ``grad`` breaks the gradient and not the loss."""

    def __init__(self, at, grad=False):
        super().__init__()
        self.at, self.grad, self.asked = at, grad, []

    def forward(self, batch):
        output = super().forward(batch)
        if int(self.seen) == self.at:
            if self.grad:
                root = (0 * output.loss).sqrt()  # 0, with a slope of infinity times 0
                return Output(output.loss + root, output.terms, output.logits)
            bad = output.terms["mse"] * math.nan
            return Output(output.loss + bad, output.terms | {"mse": bad}, output.logits)
        return output

    def check_finite(self, output, batch):
        self.asked.append(sorted(output.terms))
        raise NonFiniteError("teacher block 1 query holds NaN")


def test_a_non_finite_loss_stops_and_is_explained(tmp_path):
    module = Breaking(at=6)
    message = r"step 6: mse, loss not finite; teacher block 1 query holds NaN"
    with pytest.raises(NonFiniteError, match=message):
        run(tmp_path, module, save_every=5)
    assert module.asked == [["ce", "mse"]]
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert list(checkpoint.checkpoints(tmp_path / "run")) == [5]
    with pytest.raises(NonFiniteError, match="step 2: grad_norm not finite"):
        run(tmp_path / "b", Breaking(at=2, grad=True))


def test_a_module_that_refuses_itself_gets_the_step_named(tmp_path):
    class Refusing(FakeDistiller):
        def forward(self, batch):
            if int(self.seen) == 2:
                raise NonFiniteError("teacher state 1 holds NaN")
            return super().forward(batch)

    with pytest.raises(NonFiniteError, match="step 3: teacher state 1 holds NaN"):
        run(tmp_path, Refusing())


def test_what_is_noticed_late_is_dated_right():
    meter = Meter(make_accelerator(), capacity=5)
    for step in range(11, 15):
        value = torch.tensor(math.inf if step >= 13 else 1.0)
        meter.add({"a": torch.tensor(1.0), "b": value}, 1.0)
        meter.end_update(torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match=r"step 13: b not finite \(noticed at step 14\)"):
        meter.check(14, gradient=False)
    with pytest.raises(NonFiniteError, match=r"step 11: grad_norm not finite \(noticed"):
        meter.check(14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "y"}, "stage.objective was 'x', now 'y'"),
        ({"batch_size": 6}, "stage.batch_size was 8, now 6"),
        ({"lr": 0.1, "steps": 12}, r"stage.steps was 9, now 12; .*stage.lr was 0.02, now 0.1"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"data": examples(23)}, "data.examples was 24, now 23"),
        ({"data": examples(24, seed=1)}, "data.checksum_of_lengths"),
        ({"data": [row | {"labels": 0} for row in examples(24)]}, "data.checksum_of_a_sample"),
    ],
)
def test_another_run_cannot_go_on_from_a_checkpoint(tmp_path, changes, message):
    run(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint-9 was made by another run") as error:
        run(tmp_path, resume=True, **changes)
    assert error.match(message) or message in str(error.value)


def test_another_version_of_a_library_is_said(tmp_path, monkeypatch, caplog):
    run(tmp_path)
    monkeypatch.setattr(run_record, "version", lambda name: f"{name} 9")
    run(tmp_path, resume=True)
    assert "checkpoint-9: transformers was 5" in caplog.text
    assert "now transformers 9; results may differ in bits" in caplog.text


def test_another_number_of_threads_is_said(tmp_path, monkeypatch, caplog):
    threads = torch.get_num_threads()
    run(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    run(tmp_path, resume=True)
    assert f"threads was {threads}, now {threads + 1}; results may differ in bits" in caplog.text


def test_another_teacher_cannot_take_over(tmp_path):
    run(tmp_path)
    module = FakeDistiller()
    nn.init.zeros_(module.teacher.head.bias)
    with pytest.raises(CheckpointError, match="teacher was"):
        run(tmp_path, module, resume=True)


def test_how_often_to_save_and_log_may_change(tmp_path):
    straight, _ = run(tmp_path / "a", Breaking(at=0))
    with pytest.raises(NonFiniteError):
        run(tmp_path, Breaking(at=8), save_every=5, log_every=4)
    resumed, result = run(tmp_path, Breaking(at=0), resume=True, save_every=3, log_every=2)
    assert [row["step"] for row in result.history] == [4, 6, 8, 9]
    assert same_state(straight, resumed)


def test_a_folder_in_use_is_not_written_to(tmp_path):
    _, result = run(tmp_path)
    with pytest.raises(ValueError, match="already holds checkpoint-"):
        run(tmp_path)
    module, again = run(tmp_path, FakeDistiller(seed=5), resume=True)  # done: nothing is left to do
    assert again.steps == 9
    assert again.history == result.history
    saved = checkpoint.read(result.last_checkpoint).tensors["model"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_killed_after_its_last_checkpoint_it_clears_up_when_resumed(tmp_path, monkeypatch):
    def killed(folder, keep_last, best):
        if (folder / "checkpoint-9").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "prune", killed)
        run(tmp_path, save_every=3, keep_last=1)
    assert list(checkpoint.checkpoints(tmp_path / "run")) == [3, 6, 9]
    run(tmp_path, resume=True, save_every=3, keep_last=1)
    assert list(checkpoint.checkpoints(tmp_path / "run")) == [9]


def test_workers_and_random_collating_change_nothing(tmp_path):
    def noisy(rows):
        batch = collate(rows)
        keep = torch.rand(batch["input_ids"].shape) > 0.2
        return batch | {"input_ids": batch["input_ids"].where(keep, 1 + np.random.randint(9))}

    here, _ = run(tmp_path / "a", FakeDistiller(dropout=0.3), collate=noisy)
    there, _ = run(tmp_path / "b", FakeDistiller(dropout=0.3), collate=noisy, num_workers=2)
    plain, _ = run(tmp_path / "c", FakeDistiller(dropout=0.3))
    assert same_state(here, there)
    assert not same_state(here, plain)
