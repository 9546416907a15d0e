"""What the loop refuses, before the first batch wherever that is possible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model
from training_fakes import VOCAB, FakeDistiller, collate, examples, run

from bertkd.errors import CheckpointError
from bertkd.training import Recipe, Stage, make_accelerator, predict, run_recipe, train
from bertkd.training.machine import check_machine
from bertkd.training.run_record import identity

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([], ValueError, "train_data is empty: it has no examples"),
        ((x for x in examples()), TypeError, "must be a sequence of examples, got a generator"),
        ({"train": examples()}, TypeError, "examples, got a dict of train; pass one split"),
        ([{"text": "a"}], ValueError, r"train_data\[0\] has no 'input_ids', only text"),
        (
            [*examples(3), {"labels": 1}],
            ValueError,
            r"train_data\[3\] has no 'input_ids', only lab",
        ),
        (["a b"], TypeError, r"train_data\[0\] must be a mapping with 'input_ids', got a str"),
    ],
)
def test_data_that_is_not_examples(tmp_path, data, kind, message):
    stage = Stage(objective="x", steps=1)
    with pytest.raises(kind, match=message):
        train(FakeDistiller(), stage, data, output_dir=tmp_path / "run", collate=collate)
    assert not (tmp_path / "run").exists()


class Bare(FakeDistiller):
    def forward(self, batch):
        return super().forward(batch).loss


def test_what_cannot_work_is_refused_before_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match=r"warmup must be shorter.* got 9 updates of the 9 of"):
        run(tmp_path, steps=9, warmup=9)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        run(tmp_path, FakeDistiller().requires_grad_(False))
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU"):
        run(tmp_path, precision="fp16")
    with pytest.raises(ValueError, match="'bf16' but the accelerator was made with mixed_prec"):
        run(tmp_path, precision="bf16", accelerator=make_accelerator())
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4, which would divide"):
        run(tmp_path, accelerator=Accelerator(gradient_accumulation_steps=4))
    with pytest.raises(ValueError, match="picks its best weights by metric='accuracy', but there"):
        run(tmp_path, metric="accuracy", eval_every=2)
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 1\.5"):
        run(tmp_path, seed=1.5)
    model = tiny_model("bert", hidden=16, heads=2, vocab_size=VOCAB)
    with pytest.raises(TypeError, match=r"module is a BertModel; train Supervised\(model\)"):
        run(tmp_path, model)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match=r"Bare gave a Tensor; .* object with loss"):
        run(tmp_path, Bare())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_trained(tmp_path, dtype):
    module = FakeDistiller().to(dtype)
    with pytest.raises(
        ValueError, match=r"weights are to be trained .* in (b?float16), .*float\(\)"
    ):
        run(tmp_path, module)
    assert not (tmp_path / "run").exists()
    # Frozen ones may be in any.
    module = FakeDistiller()
    module.register_parameter("frozen", torch.nn.Parameter(torch.ones(2, dtype=dtype), False))
    run(tmp_path, module)


def test_what_a_machine_lacks_is_told_without_making_anything():
    check_machine("bf16", ["tensorboard", "all"])
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU"):
        check_machine("fp16")
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'"):
        check_machine("fp32", "tensorbord")
    with pytest.raises(ImportError, match="'comet_ml' is not installed; install it, or name"):
        check_machine("fp32", "comet_ml")


def test_settings_that_a_run_states_are_its_own(tmp_path):
    stated = {"layers": (0, 3), "student": None}
    run(tmp_path, settings=stated)
    run(tmp_path, settings=stated, resume=True)
    run(tmp_path, resume=True)  # states nothing
    with pytest.raises(CheckpointError, match=r"settings\.layers was \[0, 3\], now \[1, 3\]; set"):
        run(tmp_path, settings={"layers": [1, 3], "student": "mine"}, resume=True)
    run(tmp_path / "older")
    run(tmp_path / "older", settings=stated, resume=True)


def test_a_stage_that_is_not_evaluated_needs_no_eval_fn(tmp_path):
    assert run(tmp_path, metric="accuracy", eval_every=None)[1].best_metric is None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (0.5, r"must return metrics by name, e\.g\. .*, got 0\.5"),
        (None, "must return metrics by name"),
        ({"accuracy": None}, "'accuracy' must be a number, got None"),
        ({"accuracy": "high"}, "'accuracy' must be a number, got 'high'"),
    ],
)
def test_an_evaluation_that_gives_no_numbers(tmp_path, result, message):
    with pytest.raises(TypeError, match=f"eval_fn.*{message}"):
        run(tmp_path, eval_fn=lambda student: result, eval_every=2)


def test_numpy_numbers_train_save_and_resume(tmp_path):
    settings = {"steps": np.int64(3), "lr": np.float32(0.02), "seed": np.int64(3)}
    run(tmp_path, **settings)
    assert run(tmp_path, resume=True, **settings)[1].steps == 3


@pytest.mark.parametrize(
    "layer_map", [{0: 3, 1: 5}, [(0, 3), (1, 5)], np.array([[0, 3], [1, 5]]), {np.int64(0): 3}]
)
def test_any_way_of_writing_a_layer_map_can_be_resumed(tmp_path, layer_map):
    run(tmp_path, layer_map=layer_map)
    assert run(tmp_path, layer_map=layer_map, resume=True)[1].steps == 9


def test_a_layer_map_that_no_checkpoint_can_hold_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="layer_map: a recipe cannot hold a set; write pairs"):
        run(tmp_path, layer_map={(0, 3)})
    assert not (tmp_path / "run").exists()


def test_history_rows_may_be_as_rare_as_one_likes(tmp_path):
    _, result = run(tmp_path, log_every=10**12)
    assert [row["step"] for row in result.history] == [9]


def test_a_recipe_is_checked_before_its_first_stage_is_trained(tmp_path):
    settings = {"collate": collate, "log_with": None, "progress": False}
    first = Stage(objective="x", name="one", steps=2, eval_every=None)
    second = {"objective": "x", "name": "two", "steps": 2, "eval_every": None}

    def train_with(**changes):
        recipe = Recipe(stages=(first, Stage(**second | changes)))
        module = FakeDistiller()
        return run_recipe(recipe, lambda _: module, examples(), output_dir=tmp_path, **settings)

    with pytest.raises(ValueError, match="stage 'two' picks its best weights by"):
        train_with(metric="accuracy", eval_every="epoch")
    with pytest.raises(ValueError, match="got 5 updates of the 2 of stage 'two'; give fewer"):
        train_with(warmup=5)
    (tmp_path / "2-two" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="2-two already holds checkpoint-1"):
        train_with()
    assert not (tmp_path / "1-one").exists()


def test_predict_names_what_it_cannot_use():
    model = tiny_model("bert", hidden=16, heads=2, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="data is empty"):
        predict(model, [], collate)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            predict(model, examples(3), collate, batch_size=size)
    with pytest.raises(TypeError, match="BertModel, which gives no logits"):
        predict(model, examples(3), collate)
    words = tiny_model("bert", hidden=16, heads=2, vocab_size=VOCAB, head_cls="mlm")
    data = [{"input_ids": [1] * n, "labels": 0, "index": 0} for n in (3, 5)]
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM, whose logits .* \(\(3, .*pad all examples"
    ):
        predict(words, data, collate, batch_size=1)
    assert torch.is_grad_enabled()


def test_a_model_is_known_by_its_encoder_alone():
    """A pooler or a head that the checkpoint lacks is drawn anew, and other machines may draw others."""
    model, other = (tiny_model("bert", head_cls="sequence") for _ in range(2))
    with torch.no_grad():
        other.classifier.weight.add_(1)
        other.bert.pooler.dense.weight.add_(1)
        assert identity(other) == identity(model) == identity(model.bert)
        other.bert.encoder.layer[1].output.dense.bias.add_(1)
    assert identity(other) != identity(model)
