"""What a Distiller spares its models: masks without pads, which both would wait for, and autocast of a half teacher."""

from __future__ import annotations

import pytest
import torch
from test_distiller import BOTH, gradients, models
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from bertkd.distiller import Distiller, _look_over


def masks_seen(*networks):
    """The masks that the networks are called with from now on, in order."""
    seen = []
    for model in networks:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")),
            with_kwargs=True,
        )
    return seen


def run(distiller, batch):
    distiller.zero_grad()
    loss = distiller(batch).loss
    loss.backward()
    return [loss.detach(), *gradients(distiller).values()]


@pytest.mark.parametrize("objective", [BOTH, "att_mse + val_kl + att_pearson", "hid_cls"])
def test_a_mask_of_ones_is_no_mask(objective, monkeypatch):
    teacher, student = models()
    distiller = Distiller(teacher, student, objective)
    batch = tiny_batch(teacher)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    seen = masks_seen(teacher, student)
    without = run(distiller, batch)
    assert seen == [None, None]
    assert "attention_mask" in batch
    monkeypatch.setattr(Distiller, "_inputs", lambda self, batch: (batch, False))
    for got, want in zip(without, run(distiller, batch), strict=True):
        torch.testing.assert_close(got, want)
    assert len(seen) == 4
    assert seen[2] is seen[3] is batch["attention_mask"]


def test_one_pad_is_enough_to_keep_the_mask():
    teacher, student = models()
    batch = tiny_batch(teacher)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][-1, -1] = 0
    seen = masks_seen(teacher, student)
    Distiller(teacher, student, BOTH)(batch)
    assert [mask is batch["attention_mask"] for mask in seen] == [True, True]


@pytest.mark.parametrize("which", [0, 1])
def test_attention_that_does_not_ask_the_device_is_not_asked_for(which):
    both = models()
    both[which].set_attn_implementation("eager")
    batch = tiny_batch(both[0])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    seen = masks_seen(*both)
    Distiller(*both, BOTH)(batch)
    assert [mask is batch["attention_mask"] for mask in seen] == [True, True]


class Asked(TorchDispatchMode):
    """Counts how often the host reads a number off a tensor, for which it would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "nomic_bert", "roberta"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_device_is_asked_once_whether_there_are_pads(family, padding, monkeypatch):
    teacher, student = tiny_model(family, layers=4), tiny_model(family, seed=1)
    distiller = Distiller(teacher, student, BOTH, attention="keep", impl="chunked")
    # Made on CPUs only.
    distiller.finite_checks = False
    monkeypatch.setattr("bertkd.distiller.check_batch", lambda *args: None)
    batch = tiny_batch(teacher, padding=padding)
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    with Asked() as asked:
        bool(batch["attention_mask"].all())
    assert asked.count == 1
    with Asked() as asked:
        distiller(batch)
    assert asked.count == 1


@pytest.mark.parametrize("attention", ["auto", "keep"])
def test_known_pads_change_nothing(attention, monkeypatch):
    for family in ("bert", "modernbert"):
        teacher, student = tiny_model(family, layers=4), tiny_model(family, seed=1)
        distiller = Distiller(teacher, student, BOTH, attention=attention)
        batch = tiny_batch(teacher, padding="left")
        known = run(distiller, batch)
        with monkeypatch.context() as patch:
            patch.setattr(Distiller, "_inputs", lambda self, batch: (batch, False))
            for got, want in zip(known, run(distiller, batch), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("attention", ["auto", "keep"])
def test_a_compiled_model_has_a_graph_for_batches_without_pads_and_one_for_others(attention):
    torch._dynamo.reset()
    teacher, student = models()
    distiller = Distiller(teacher, student, BOTH, attention=attention)
    padded, full = tiny_batch(teacher, padding="right"), tiny_batch(teacher)
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    want = [run(distiller, batch) for batch in (padded, full)]
    counters = CompileCounter(), CompileCounter()
    for model, counter in zip((teacher, student), counters, strict=True):
        model.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        for batch, expected in zip((padded, full), want, strict=True):
            for got, each in zip(run(distiller, batch), expected, strict=True):
                torch.testing.assert_close(got, each)
        assert [counter.frame_count for counter in counters] == [2, 2]
    torch._dynamo.reset()


def captured_states(teacher, student):
    # Its own attention, as it is alone: bertkd's rounds otherwise.
    distiller = Distiller(teacher, student, "hid_seq", attention="keep")
    batch = tiny_batch(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = distiller._record_teacher(batch, distiller.objective.needs())
        loss = distiller(batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    return recording.states


def test_a_teacher_in_half_precision_runs_in_it_under_autocast():
    teacher, student = models()
    alone = teacher.to(torch.bfloat16)
    states = captured_states(alone, student)
    assert {x.dtype for x in states.values()} == {torch.bfloat16}
    with torch.no_grad():
        every = alone(**tiny_batch(alone), output_hidden_states=True).hidden_states
    for index, state in states.items():
        assert torch.equal(state, every[index])


def test_other_teachers_run_as_autocast_has_it():
    class Watched(nn.Module):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x

    for dtype in (torch.float32, torch.bfloat16):
        for kept in (False, True):
            seen = []
            teacher, student = models()
            teacher.to(dtype).embeddings.dropout = Watched()
            if kept:
                # One norm in float32: without autocast its neighbours would not take what it gives.
                teacher.encoder.layer[0].output.LayerNorm.float()
            captured_states(teacher, student)
            assert set(seen) == {dtype == torch.float32 or kept}


def test_the_look_over_agrees_with_pytorchs_own_walks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()))
    model[1].register_module("nothing", None)
    assert _look_over(model) == (True, False)
    model.half().eval()
    assert _look_over(model) == (False, True)
    model[1][1].train()
    assert _look_over(model) == (True, True)
    model[1][0].double()
    assert _look_over(model) == (True, False)
