"""Gradients through captured tensors, dropout, and gradient checkpointing."""

import copy
import warnings
from functools import partial

import pytest
import torch
from tiny_models import ALL_TYPES, MODEL_TYPES, gradients, tiny_batch, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from bertkd.capture import Capture
from bertkd.encoders import block_list

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
CHECKPOINTED = [name for name in ALL_TYPES if name not in ("albert", "mpnet")]


def checkpoint(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(kwargs or {"use_reentrant": False})
    return model


def drop(model, rate):
    """Train with ``rate`` in every dropout, those of the attention maps included."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = rate
    return model.train()


def weights_like(tensor):
    return torch.linspace(-1, 1, tensor.numel()).view_as(tensor).sin()


def loss_of(maps, states):
    return sum((weights_like(x) * x).sum() for x in (*maps, *(s.tanh() for s in states)))


def captured_loss(recording):
    maps = [
        (recording.q[i] @ recording.k[i].mT * recording.scale[i]).softmax(-1) for i in recording.q
    ]
    return loss_of(maps, recording.states.values())


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    assert len(want) > 5
    for name in want:
        torch.testing.assert_close(got[name], want[name], **CLOSE, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_equal_those_through_the_eager_maps(model_type):
    model = tiny_model(model_type, layers=3)
    twin = tiny_model(model_type, layers=3, attn_implementation="eager")
    batch = tiny_batch(model, padding=None)
    captured_loss(Capture(model, blocks=[0, 1], states=[0, 2])(**batch)).backward()
    truth = twin(**batch, output_attentions=True, output_hidden_states=True)
    loss_of(truth.attentions[:2], [truth.hidden_states[i] for i in (0, 2)]).backward()
    assert_same_gradients(gradients(model), gradients(twin))


@pytest.mark.parametrize("model_type", CHECKPOINTED)
def test_checkpointing_changes_nothing(model_type):
    """Not the value, not the gradients, not the random numbers drawn, nor what is recorded."""
    model = drop(tiny_model(model_type, layers=3), 0.1)
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[0, 2], states=[0, 1, 3])
    torch.manual_seed(1)
    plain = captured_loss(capture(**batch))
    plain.backward()
    want, after = gradients(model), torch.random.get_rng_state()

    checkpoint(model)
    torch.manual_seed(1)
    with capture.record() as recording:
        model(**batch)
        loss = captured_loss(recording)
        before = {i: id(tensor) for i, tensor in recording.q.items()}
        loss.backward()
        assert {i: id(tensor) for i, tensor in recording.q.items()} == before
    assert torch.equal(loss, plain)
    assert torch.equal(torch.random.get_rng_state(), after)
    assert_same_gradients(gradients(model), want)


def test_checkpointing_recomputes_unseen_by_a_later_capture():
    """The backward of an earlier forward runs blocks again: they are not this capture's."""
    model = checkpoint(tiny_model("bert")).train()
    batch, other = tiny_batch(model), tiny_batch(model, seed=1)
    drop(model, 0.0)
    capture = Capture(model, blocks=[0, 1], states=[0, 2])
    want = capture(**other)
    earlier = model(**batch).last_hidden_state.sum()
    with capture.record() as recording:
        earlier.backward()
        assert recording.q == {}
        model(**other)
    assert torch.equal(recording.q[1], want.q[1])
    assert torch.equal(recording.states[2], want.states[2])


def test_reentrant_checkpointing_is_refused_only_in_training():
    model = tiny_model("bert").train()
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[0])
    # Without the argument torch checkpoints reentrantly.
    for kwargs in ({"use_reentrant": True}, {"preserve_rng_state": True}):
        checkpoint(model, **kwargs)
        with pytest.raises(ValueError, match=r'reentrant.*"use_reentrant": False'):
            capture(**batch)
        with pytest.raises(ValueError, match="reentrant"), capture.record():
            pass
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            capture(**batch)
        model.eval()
        assert capture(**batch).q[0].requires_grad
        model.train()


@pytest.mark.parametrize("model_type", ["albert", "bert", "modernbert"])
def test_pytorchs_checkpoint_wrapper_changes_nothing_or_is_refused(model_type):
    """FSDP's way of checkpointing; a reentrant one runs its block without gradients."""
    model = tiny_model(model_type, layers=3)
    batch = tiny_batch(model)
    wanted = {"blocks": [0, 2], "states": [0, 1, 3], "instead_of_sdpa": "bertkd_cpu"}
    captured_loss(Capture(model, **wanted)(**batch)).backward()
    want = gradients(model)
    for kind in (CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT):
        wrapped = copy.deepcopy(model)
        originals = {id(block) for block in block_list(wrapped)}
        apply_activation_checkpointing(
            wrapped,
            checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
            check_fn=lambda module, ids=originals: id(module) in ids,
        )
        capture = Capture(wrapped, **wanted)
        if kind is CheckpointImpl.REENTRANT:
            with pytest.raises(ValueError, match=r"reentrant.*NO_REENTRANT"):
                capture(**batch)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert len(capture(**batch).q) == 2
            continue
        captured_loss(capture(**batch)).backward()
        got = gradients(wrapped)
        assert_same_gradients(
            {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in got.items()}, want
        )


def test_a_forward_without_gradients_is_recorded_wherever_they_are_switched_off():
    model = tiny_model("bert")
    capture = Capture(model, blocks=[0], states=[1])
    with capture.record() as recording, torch.no_grad():
        model(**tiny_batch(model))
    assert not recording.q[0].requires_grad


def test_stopping_early_is_left_out_under_checkpointing():
    model = checkpoint(tiny_model("bert", layers=3)).train()
    capture = Capture(model, blocks=[0])
    recording = capture(**tiny_batch(model), stop_early=True)
    assert recording.output is not None
    recording.q[0].sum().backward()
    with torch.no_grad():
        assert capture(**tiny_batch(model), stop_early=True).output is not None
    model.eval()
    assert capture(**tiny_batch(model), stop_early=True).output is None


@pytest.mark.parametrize(
    ("model_type", "dropouts"),
    [
        ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}),
        ("distilbert", {"dropout": 0.0, "attention_dropout": 0.5}),
        ("modernbert", {"attention_dropout": 0.5}),
    ],
)
def test_the_map_is_that_before_dropout(model_type, dropouts):
    model = tiny_model(model_type, layers=1, attn_implementation="eager", **dropouts)
    batch = tiny_batch(model, padding=None)
    want = model(**batch, output_attentions=True).attentions[0]
    recording = Capture(model.train(), blocks=[0])(**batch, output_attentions=True)
    assert (recording.output.attentions[0] == 0).any()
    got = (recording.q[0] @ recording.k[0].mT * recording.scale[0]).softmax(-1)
    torch.testing.assert_close(got, want)


def test_training_draws_the_same_random_numbers_with_and_without_capture():
    model = drop(tiny_model("roberta", layers=3), 0.3)
    batch = tiny_batch(model)
    torch.manual_seed(3)
    want = model(**batch).last_hidden_state
    torch.manual_seed(3)
    got = Capture(model, blocks=[0, 2], states=[1])(**batch).output.last_hidden_state
    assert torch.equal(got, want)


def test_a_teacher_without_gradients_keeps_none():
    model = tiny_model("bert")
    with torch.no_grad():
        recording = Capture(model, blocks=[1], states=[1])(**tiny_batch(model))
    assert not recording.q[1].requires_grad
    assert not recording.states[1].requires_grad


def test_autocast_captures_what_attention_was_given():
    model = tiny_model("bert")
    with torch.autocast("cpu", torch.bfloat16):
        recording = Capture(model, blocks=[1])(**tiny_batch(model))
    assert recording.q[1].dtype == recording.v[1].dtype == torch.bfloat16
    recording.q[1].float().sum().backward()
    assert model.encoder.layer[1].attention.self.query.weight.grad is not None
