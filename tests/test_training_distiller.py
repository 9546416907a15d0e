"""The loop with what it is made for: Distillers and fine-tuning of Hugging Face models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from training_fakes import VOCAB, collate, examples, same_state

from bertkd import Distiller, create_student
from bertkd.errors import CheckpointError, NonFiniteError
from bertkd.training import (
    Recipe,
    Stage,
    Supervised,
    checkpoint,
    distiller_for,
    export,
    predict,
    run_recipe,
    train,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

SETTINGS = {"collate": collate, "log_with": None, "progress": False}
SHARED = {"steps": 6, "batch_size": 8, "lr": 1e-3, "log_every": 2, "eval_every": None}
RECIPE = Recipe(
    stages=(
        Stage(name="intermediate", objective="att_kl + hid_seq", save_every=4, **SHARED),
        Stage(name="prediction", objective="kd + 0.5*ce", layer_map="last", **SHARED),
    )
)


def teacher_and_student(dropout: float = 0.2):
    sizes = {"hidden": 16, "heads": 2, "vocab_size": VOCAB, "head_cls": "sequence", "num_labels": 3}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    teacher = tiny_model("bert", layers=4, **sizes, **rates)
    return teacher, create_student(teacher, "uniform:2", hidden_size=8, num_heads=2, verbose=False)


def test_two_stages_train_one_student_and_resume_between_and_within_them(tmp_path):
    teacher, student = teacher_and_student()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = {name: value.clone() for name, value in student.state_dict().items()}
    results = run_recipe(
        RECIPE, distiller_for(teacher, student), examples(20), output_dir=tmp_path / "a", **SETTINGS
    )
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(part.training for part in teacher.modules())
    assert set(results[0].history[0]) >= {"att_kl", "hid_seq", "loss", "lr", "grad_norm"}
    assert set(results[1].history[0]) >= {"kd", "ce"}

    first, second = (checkpoint.read(result.last_checkpoint) for result in results)
    # The second stage starts where the first ended: its encoder did not fall back to the start.
    embedding = "bert.embeddings.word_embeddings.weight"
    after_first = first.tensors["model"][f"student.{embedding}"]
    assert not torch.equal(start[embedding], after_first)
    assert torch.dist(student.get_parameter(embedding), after_first) < torch.dist(
        student.get_parameter(embedding), start[embedding]
    )
    # Projections are saved and trained, but only in the stage that has them; the teacher never.
    own = {name for name in first.tensors["model"] if not name.startswith("student.")}
    assert own
    assert all(name.startswith("objective.") for name in own)
    assert all(name.startswith("student.") for name in second.tensors["model"])

    # As if killed in the first stage: the same command goes on and ends at the same weights.
    (tmp_path / "a" / "1-intermediate" / "checkpoint-6" / "run.json").unlink()
    (tmp_path / "a" / "2-prediction").rename(tmp_path / "gone")
    teacher, other = teacher_and_student()
    torch.nn.init.zeros_(other.bert.pooler.dense.weight)
    with pytest.raises(CheckpointError, match=r"run.json is missing.*'last-good'"):
        run_recipe(
            RECIPE,
            distiller_for(teacher, other),
            examples(20),
            output_dir=tmp_path / "a",
            resume=True,
            **SETTINGS,
        )
    run_recipe(
        RECIPE,
        distiller_for(teacher, other),
        examples(20),
        output_dir=tmp_path / "a",
        resume="last-good",
        **SETTINGS,
    )
    assert same_state(student, other)


def test_banks_and_random_maps_are_resumed(tmp_path):
    objective = "hid_cls_contrast + att_kl(map='random')"
    stage = Stage(objective=objective, save_every=3, **SHARED)

    def run(folder, resume):
        teacher, student = teacher_and_student(dropout=0.1)
        module = Distiller(teacher, student, objective, num_examples=20)
        settings = SETTINGS | {"output_dir": tmp_path / folder, "resume": resume}
        train(module, stage, examples(20), **settings)
        return module

    straight = run("a", False)
    (tmp_path / "a" / "checkpoint-6" / "run.json").unlink()
    assert same_state(straight, run("a", "last-good"))
    names = straight.state_dict().keys()
    assert any("extra_state" in name for name in names)


def test_bf16_and_accumulation(tmp_path):
    teacher, student = teacher_and_student()
    stage = Stage(objective="att_kl + kd", precision="bf16", accumulate=2, **SHARED)
    module = Distiller(teacher, student, stage.objective)
    result = train(module, stage, examples(20), output_dir=tmp_path, **SETTINGS)
    assert result.history[-1]["loss"] < 1.5 * result.history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_a_nan_in_the_teacher_names_step_and_layer(tmp_path):
    teacher, student = teacher_and_student()
    module = Distiller(teacher, student, "att_kl")
    with torch.no_grad():
        teacher.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step 1: .*teacher block 1 query"):
        train(
            module, Stage(objective="att_kl", **SHARED), examples(), output_dir=tmp_path, **SETTINGS
        )


def test_fine_tuning_learns_and_the_exported_model_predicts_the_same(tmp_path):
    model = tiny_model("bert", hidden=16, heads=2, vocab_size=VOCAB, head_cls="sequence")
    data = examples(48)
    for row in data:
        row["labels"] = int(row["input_ids"][0] > VOCAB // 2)

    def evaluate(student):
        logits, labels = predict(student, data, collate, batch_size=10)
        return {"accuracy": float(np.mean(logits.argmax(1) == labels))}

    before = evaluate(model)["accuracy"]
    settings = {"epochs": 10, "eval_every": 15, "batch_size": 16, "lr": 5e-3}
    stage = Stage(objective="ce", metric="accuracy", save_every=None, **settings)
    result = train(
        Supervised(model), stage, data, output_dir=tmp_path / "run", eval_fn=evaluate, **SETTINGS
    )
    assert result.best_metric > max(0.9, before)
    assert evaluate(model)["accuracy"] == result.best_metric

    from transformers import AutoModelForSequenceClassification

    path = export(model, None, tmp_path / "teacher", "# A teacher")
    loaded = AutoModelForSequenceClassification.from_pretrained(path)
    logits, labels = predict(model, data, collate)
    again, _ = predict(loaded, data, collate, batch_size=7)
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [row["labels"] for row in data]


def test_supervised_takes_several_labels_as_integers():
    kind = {"problem_type": "multi_label_classification"}
    model = tiny_model("roberta", hidden=16, heads=2, head_cls="sequence", **kind)
    batch = collate(examples(3)) | {"labels": torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])}
    output = Supervised(model)(batch)
    want = F.binary_cross_entropy_with_logits(output.logits, batch["labels"].float())
    torch.testing.assert_close(output.loss, want)


def test_supervised_refuses_what_has_no_labels(tmp_path):
    with pytest.raises(ValueError, match="BertModel takes no labels"):
        Supervised(tiny_model("bert"))
    model = tiny_model("roberta", hidden=16, heads=2, head_cls="sequence", type_vocab_size=1)
    batch = collate(examples(3))
    with pytest.raises(ValueError, match="batch has no 'labels'"):
        Supervised(model)({"input_ids": batch["input_ids"]})
    # RoBERTa has one token type: a second one in the data must not reach it.
    types = torch.ones_like(batch["input_ids"])
    output = Supervised(model)(batch | {"token_type_ids": types})
    assert torch.equal(output.terms["ce"], output.loss)
    assert output.logits.shape == (3, 3)


def test_predict_keeps_order_mode_and_weights():
    model = tiny_model("bert", hidden=16, heads=2, vocab_size=VOCAB, head_cls="sequence").train()
    data = examples(11)
    logits, labels = predict(model, data, collate, batch_size=4)
    assert model.training
    assert logits.dtype == np.float32
    assert labels.tolist() == [row["labels"] for row in data]
    model.eval()
    for row, expected in zip(data, logits, strict=True):
        single = model(torch.tensor([row["input_ids"]])).logits[0]
        np.testing.assert_allclose(single.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    unlabelled = [{"input_ids": row["input_ids"], "labels": 0, "index": 0} for row in data]
    bare = lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"}  # noqa: E731
    assert predict(model, unlabelled, bare)[1] is None
