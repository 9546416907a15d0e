"""The training loop on a GPU: precisions, exact resumption, and no waiting between log rows."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from accelerate.state import AcceleratorState
from tiny_models import tiny_model
from training_fakes import VOCAB, FakeDistiller, collate, examples, same_state

from bertkd import Distiller, create_student
from bertkd.errors import NonFiniteError
from bertkd.training import Stage, checkpoint, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(folder, module, **options):
    resume = options.pop("resume", False)
    stage = {"objective": "x", "steps": 12, "lr": 0.02, "batch_size": 8, "save_every": None}
    return train(
        module,
        Stage(**stage | options),
        examples(),
        output_dir=folder,
        collate=collate,
        resume=resume,
        log_with=None,
        progress=False,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_ends_bitwise_where_the_straight_one_does(tmp_path, precision):
    options = {"precision": precision, "save_every": 5, "keep_last": 9, "log_every": 4}
    straight, again = FakeDistiller(dropout=0.3), FakeDistiller(dropout=0.3, seed=7)
    result = run(tmp_path, straight, **options)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    for step in (10, 12):
        (tmp_path / f"checkpoint-{step}" / "run.json").unlink()
    run(tmp_path, again, resume="last-good", **options)
    assert next(again.parameters()).is_cuda
    assert same_state(straight, again)


def test_nothing_waits_for_the_device_between_rows_of_the_history(tmp_path):
    def waits(steps):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run(tmp_path / str(steps), FakeDistiller(), steps=steps, log_every=1000)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in seen)

    waits(10)
    assert waits(40) == waits(20)


def test_a_non_finite_loss_is_noticed_before_a_checkpoint_and_dated(tmp_path):
    class Breaking(FakeDistiller):
        def forward(self, batch):
            output = super().forward(batch)
            output.loss = output.loss * torch.where(self.seen == 3, torch.nan, 1.0)
            return output

    with pytest.raises(NonFiniteError, match=r"step 3: .*loss.*\(noticed at step 5\)"):
        run(tmp_path, Breaking(), log_every=1000, save_every=5)
    assert not checkpoint.checkpoints(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_distiller_trains_on_the_kernels_and_resumes_bitwise(tmp_path, precision):
    """The thing itself: captured heads, fused losses of several ops, autocast, and a checkpoint in between."""

    def distiller():
        sizes = {"hidden": 64, "heads": 4, "vocab_size": VOCAB}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            teacher = tiny_model("bert", layers=4, **sizes)
        student = create_student(teacher, "uniform:2", hidden_size=32, num_heads=4, verbose=False)
        return Distiller(
            teacher, student, "att_kl + qkv_kl(relation_heads=4) + hid_seq", impl="triton"
        )

    def unlabelled(batch):
        return {k: v for k, v in collate(batch).items() if k != "labels"}

    def train_it(module, **options):
        stage = Stage(
            objective="x", steps=12, lr=1e-3, batch_size=8, save_every=5, keep_last=9, log_every=2,
            precision=precision,
        )  # fmt: skip
        return train(
            module, stage, examples(), output_dir=tmp_path, collate=unlabelled, log_with=None,
            progress=False, **options,
        )  # fmt: skip

    straight, again = distiller(), distiller()
    result = train_it(straight)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert next(straight.teacher.parameters()).is_cuda
    for step in (10, 12):
        (tmp_path / f"checkpoint-{step}" / "run.json").unlink()
    train_it(again, resume="last-good")
    assert same_state(straight, again)
