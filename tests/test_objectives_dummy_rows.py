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


@pytest.mark.parametrize("objective", INSIDES)
def test_a_batch_of_nothing_but_pads_is_worth_nothing(objective):
    batch = tiny_batch(tiny_model("bert"), batch=2, length=9)
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    loss, *grads = loss_and_grads(objective, None, {}, batch)
    assert loss == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)
