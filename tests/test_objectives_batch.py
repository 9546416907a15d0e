"""Batches that the models or the terms could not use are refused by the column's name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from bertkd.distiller import Distiller
from bertkd.objectives.batch import check_batch


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda b: {**b, "attention_mask": b["attention_mask"].tolist()}, TypeError, "must be a tensor, got list"),
        (lambda b: {**b, "input_ids": b["input_ids"].numpy()}, TypeError, "must be a tensor, got ndarray"),
        (lambda b: {**b, "attention_mask": b["attention_mask"][:, None, None]}, ValueError, "the shape of input_ids"),
        (lambda b: {**b, "attention_mask": b["attention_mask"][:, 1:]}, ValueError, "the shape of input_ids"),
        (lambda b: {"input_ids": b["input_ids"][0]}, ValueError, r"must be \(B, L\), .*got shape \(12,\)"),
        (lambda b: {k: v[:0] for k, v in b.items()}, ValueError, r"neither of them 0, got shape \(0, 12\)"),
        (lambda b: {**b, "input_ids": b["input_ids"].float()}, TypeError, "must be int64 or int32, got torch.float32"),
        (lambda b: {**b, "input_ids": b["input_ids"].short()}, TypeError, "int64 or int32, got torch.int16"),
        (lambda b: {**b, "input_ids": b["input_ids"].bool()}, TypeError, r"got torch.bool; .*\.long\(\)"),
        (lambda b: {**b, "input_ids": b["input_ids"] + 200}, ValueError, r"input_ids run from .* embeds 0\.\.199"),
        (lambda b: {**b, "input_ids": torch.full_like(b["input_ids"], 200)}, ValueError, "from 200 to 200, but"),
        (lambda b: {**b, "input_ids": torch.full_like(b["input_ids"], -1)}, ValueError, "from -1 to -1, but"),
        (lambda b: {**b, "attention_mask": (1.0 - b["attention_mask"]) * -1e4}, TypeError, "additive one, mask == 0"),
    ],
)  # fmt: skip
def test_a_batch_that_is_not_the_tokenizers(change, error, match):
    teacher = tiny_model("bert")
    distiller = Distiller(teacher, tiny_model("bert", seed=1), "pool")
    with pytest.raises(error, match=match):
        distiller(change(tiny_batch(teacher, padding="right")))


@pytest.mark.parametrize("batch", [[1], "text", None])
def test_a_batch_that_is_no_mapping(batch):
    distiller = Distiller(tiny_model("bert", layers=4), tiny_model("bert", seed=1), "att_kl")
    with pytest.raises(TypeError, match="batch must be a mapping"):
        distiller(batch)


def checked(batch, objective="pool", teacher=None, student=None):
    """Check a batch as the Distiller of two models would."""
    teacher = teacher or tiny_model("bert")
    student = student or tiny_model("bert", layers=1, seed=1)
    built = Distiller(teacher, student, objective).objective
    check_batch(batch, built.needs(), built, student, teacher)


@pytest.mark.parametrize("column", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x.float(), TypeError, r"must be int64 or int32, got torch\.float32"),
        (lambda x: x.bool(), TypeError, r"must be int64 or int32, got torch\.bool"),
        (lambda x: x.tolist(), TypeError, "must be a tensor, got list"),
        (lambda x: x[:, 1:], ValueError, r"the shape of input_ids, \(3, 12\), .* got \(3, 11\)"),
        (lambda x: x[None], ValueError, r"broadcasts to it, got \(1, 3, 12\)"),
        (lambda x: x - 1, ValueError, r"run from -1 to -1, but the student embeds 0\.\."),
        (lambda x: x + 512, ValueError, r"run from 512 to 512, but the student embeds 0\.\."),
    ],
)
def test_types_and_positions_that_the_models_cannot_look_up(column, change, error, match):
    batch = tiny_batch(tiny_model("bert"))
    with pytest.raises(error, match=f"{column}.*{match}"):
        checked({**batch, column: change(torch.zeros(3, 12, dtype=torch.long))})


def test_types_and_positions_by_what_each_model_takes():
    ids = tiny_batch(tiny_model("bert"))["input_ids"]
    ones = torch.ones_like(ids)
    for good in (ones, ones.int(), ones[:1]):
        checked({"input_ids": ids, "token_type_ids": good, "position_ids": good})
    with pytest.raises(
        ValueError, match=r"token_type_ids run from 2 to 2, .* teacher embeds 0\.\.1"
    ):
        student = tiny_model("bert", layers=1, seed=1, type_vocab_size=3)
        checked({"input_ids": ids, "token_type_ids": ones * 2}, student=student)
    one_type = [tiny_model("roberta", layers=n, seed=n, type_vocab_size=1) for n in (2, 1)]
    checked({"input_ids": ids, "token_type_ids": ones}, "pool", *one_type)
    # Rotary positions are looked up in no table.
    rotary = [tiny_model("modernbert", layers=n, seed=n) for n in (2, 1)]
    checked({"input_ids": ids, "position_ids": ones * 10**6}, "pool", *rotary)


def test_columns_that_nobody_reads_may_hold_anything():
    ids = tiny_batch(tiny_model("bert"))["input_ids"]
    for column in ("text", "labels", "index"):
        checked({"input_ids": ids, column: ["a", "b", "c"]})
    rotary = [tiny_model("modernbert", layers=n, seed=n) for n in (2, 1)]
    checked({"input_ids": ids, "token_type_ids": [[0] * 12] * 3}, "pool", *rotary)
    heads = [tiny_model("bert", layers=n, seed=n, head_cls="sequence") for n in (2, 1)]
    with pytest.raises(TypeError, match=r"batch\['labels'\] must be a tensor, got list"):
        checked({"input_ids": ids, "labels": [0, 1, 2]}, "kd", *heads)


def test_values_are_not_read_where_that_would_mean_waiting(monkeypatch):
    batch = tiny_batch(tiny_model("bert"))
    batch |= {"token_type_ids": batch["input_ids"] + 500}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    checked(batch)


def test_the_distiller_has_both_models_checked():
    batch = tiny_batch(tiny_model("bert"))
    distiller = Distiller(tiny_model("bert"), tiny_model("bert", layers=1, seed=1), "pool")
    with pytest.raises(ValueError, match=r"token_type_ids run from 2 to 2, but the student embeds"):
        distiller({**batch, "token_type_ids": torch.full_like(batch["input_ids"], 2)})
    rotary = [tiny_model("modernbert", layers=n, seed=n) for n in (2, 1)]
    Distiller(*rotary, "pool")({**batch, "token_type_ids": [[0] * 12] * 3})
