"""Sequences of pads only, which bring a batch to a fixed size, change no loss and no gradient."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from bertkd.distiller import Distiller

INSIDES = [
    *("att_kl", "att_mse", "val_kl", "qkv_kl", "att_pearson", "hid_seq", "hid_seq(map='combine')", "hid_cos"),
    *("hid_cls", "hid_cls(map='combine')", "pkd", "pkd@released", "alp", "pool", "pool(metric='mse')"),
]  # fmt: skip
HEADS = [("sequence", "kd", {}), ("sequence", "kd", {"num_labels": 1}), ("mlm", "kd", {})]  # fmt: skip


def loss_and_grads(objective, head_cls, overrides, batch):
    teacher = tiny_model("bert", layers=4, head_cls=head_cls, **overrides)
    student = tiny_model("bert", layers=2, seed=1, head_cls=head_cls, **overrides)
    loss = Distiller(teacher, student, objective)(batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in student.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("head_cls", "objective", "overrides"), [*((None, term, {}) for term in INSIDES), *HEADS]
)
def test_rows_of_pads_count_nowhere(head_cls, objective, overrides):
    batch = tiny_batch(tiny_model("bert"), batch=3, length=9, padding="right")
    padded = {name: torch.cat((x, torch.zeros_like(x[:2]))) for name, x in batch.items()}
    wanted = loss_and_grads(objective, head_cls, overrides, batch)
    assert wanted[0] > 0
    for got, want in zip(
        loss_and_grads(objective, head_cls, overrides, padded), wanted, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:a batch of 1 has no negatives")
@pytest.mark.parametrize("mode", ["bank", "batch", "queue"])
def test_rows_of_pads_are_no_examples_of_a_contrast(mode):
    teacher = tiny_model("bert", layers=4)
    student = tiny_model("bert", seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = tiny_batch(teacher, length=9) | {"index": torch.arange(3), "labels": torch.arange(3)}
    # The index of one of them is an example's, that of the other is none.
    filled = {"index": torch.tensor([0, -1]), "labels": torch.tensor([1, -100])}
    padded = {
        name: torch.cat((x, filled.get(name, torch.zeros_like(x[:2])))) for name, x in batch.items()
    }
    found = []
    for each in (batch, padded):
        student.zero_grad()
        distiller = Distiller(teacher, student, f"hid_cls_contrast(mode='{mode}')", num_examples=9)
        loss = distiller.train()(each).loss
        loss.backward()
        grads = [p.grad for p in distiller.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads, *distiller.objective.buffers()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    padded["attention_mask"] = torch.zeros_like(padded["attention_mask"])
    assert distiller(padded).loss == 0


@pytest.mark.parametrize("objective", INSIDES)
def test_a_batch_of_nothing_but_pads_is_worth_nothing(objective):
    batch = tiny_batch(tiny_model("bert"), batch=2, length=9)
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    loss, *grads = loss_and_grads(objective, None, {}, batch)
    assert loss == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)
