"""Training in bf16 and fp16."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from training_fakes import FakeDistiller, run, same_state

from bertkd.errors import NonFiniteError
from bertkd.training import Stage, checkpoint, make_accelerator
from bertkd.training.schedule import build_optimizer

pytestmark = pytest.mark.usefixtures("on_cpu")


def test_bf16_runs_the_forward_under_autocast_and_keeps_fp32_weights(tmp_path):
    class Watching(FakeDistiller):
        def forward(self, batch):
            output = super().forward(batch)
            self.dtype = output.logits.dtype
            return output

    module, result = run(tmp_path, Watching(), precision="bf16")
    assert module.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert "forward" not in vars(module)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    module, _ = run(tmp_path / "b", Watching())  # and the next run is free to choose again
    assert module.dtype == torch.float32


def plain_adamw(make, groups, fused, **options):
    return make(groups, **options)


def test_the_fused_step_is_left_out_where_a_scaler_must_skip_it():
    for precision, fused in (("fp32", True), ("bf16", True), ("fp16", False)):
        stage = Stage(objective="x", lr=0.1, steps=1, precision=precision)
        assert build_optimizer(FakeDistiller(), stage).defaults["fused"] is fused


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown precision 'no'\. Known: bf16, fp16, fp32"):
        make_accelerator("no")


def fp16(initial=2.0**10):
    """What Accelerate does for fp16, on the CPU: everything but the dtype of the forward."""
    accelerator = make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=3)
    accelerator.unscale_gradients = lambda wrapped: accelerator.scaler.unscale_(wrapped.optimizer)
    return accelerator


def test_overflows_of_the_scaler_are_skipped_counted_and_resumed(tmp_path, monkeypatch):
    # As fp16 would have it; the stage says fp32, because fp16 itself needs a GPU.
    monkeypatch.setattr("torch.optim.AdamW", partial(plain_adamw, torch.optim.AdamW))

    class Overflowing(FakeDistiller):
        def forward(self, batch):
            output = super().forward(batch)
            if int(self.seen) in (3, 4):
                output.loss.register_hook(lambda grad: grad * math.inf)
            return output

    straight, result = run(tmp_path / "a", Overflowing(), accelerator=fp16(), log_every=2)
    assert (result.steps, result.skipped_steps) == (9, 2)
    _, plain = run(tmp_path / "plain", log_every=2)
    # The norm, and so the clipping, is that of the unscaled gradient.
    assert result.history[0]["grad_norm"] == pytest.approx(plain.history[0]["grad_norm"], rel=1e-4)
    assert all(torch.isfinite(p).all() for p in straight.parameters())
    scaler = checkpoint.read(result.last_checkpoint).documents["trainer_state"]["scaler"]
    assert scaler["scale"] == 2.0**9  # halved twice, grown once

    settings = {"save_every": 3, "keep_last": 9, "log_every": 2}
    run(tmp_path / "b", Overflowing(), accelerator=fp16(), **settings)
    for step in (6, 9):
        (tmp_path / "b" / "run" / f"checkpoint-{step}" / "run.json").unlink()
    resumed, again = run(
        tmp_path / "b", Overflowing(), accelerator=fp16(7.0), resume="last-good", **settings
    )
    assert same_state(straight, resumed)
    assert again.skipped_steps == 2


@pytest.mark.filterwarnings("error:Detected call of")
def test_a_gradient_that_no_scale_makes_finite_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.optim.AdamW", partial(plain_adamw, torch.optim.AdamW))

    class Broken(FakeDistiller):
        def forward(self, batch):
            output = super().forward(batch)
            output.loss.register_hook(lambda grad: grad * math.nan)
            return output

    # 2^-13 is just above 1e-4: the first update brings the scale below it, the second is refused.
    with pytest.raises(
        NonFiniteError, match=r"step 2: the gradient is not finite, at a loss scale"
    ):
        run(tmp_path, Broken(), accelerator=fp16(2.0**-13))
