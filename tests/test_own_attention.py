"""Encoders that compute attention themselves, with relative positions in their scores: DeBERTa and MPNet."""

import pytest
import torch
from tiny_models import OWN_ATTENTION, tiny_batch, tiny_model
from torch import nn

from bertkd import Capture, Distiller, functional
from bertkd.encoders import attention_modules, describe, projections

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
EVERY = range(3)


def heads_of(x, heads=4):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("padding", ["right", "left", "ragged"])
@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_q_k_and_v_are_the_projections_of_the_blocks_inputs(model_type, padding):
    model = tiny_model(model_type, layers=3)
    batch = tiny_batch(model, padding=padding)
    recording = Capture(model, blocks=EVERY, states=range(4))(**batch)
    hidden_states = model(**batch, output_hidden_states=True).hidden_states
    for block, attention in enumerate(attention_modules(model)):
        for part, name in zip("qkv", projections(model), strict=True):
            wanted = heads_of(getattr(attention, name)(hidden_states[block]))
            assert torch.equal(getattr(recording, part)[block], wanted)
    for index, state in enumerate(hidden_states):
        assert torch.equal(recording.states[index], state)


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_values_are_what_the_maps_mix(model_type):
    model = tiny_model(model_type, layers=3)
    batch = tiny_batch(model)
    mixed = []
    for module in attention_modules(model):
        # MPNet's attention module has its output projection inside.
        output = getattr(module, "o", None)
        if output is not None:
            output.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
        else:
            module.register_forward_hook(lambda _, args, output: mixed.append(output[0]))
    recording = Capture(model, blocks=EVERY)(**batch, output_attentions=True)
    for block in EVERY:
        context = recording.output.attentions[block] @ recording.v[block]
        torch.testing.assert_close(heads_of(mixed[block]), context, **CLOSE)


def test_without_relative_positions_q_and_k_make_debertas_maps():
    model = tiny_model(
        "deberta-v2", layers=3, relative_attention=False, pos_att_type=None, norm_rel_ebd="none"
    )
    batch = tiny_batch(model, padding=None)
    recording = Capture(model, blocks=EVERY)(**batch, output_attentions=True)
    for block in EVERY:
        scores = recording.q[block] @ recording.k[block].mT * recording.scale[block]
        torch.testing.assert_close(recording.output.attentions[block], scores.softmax(-1), **CLOSE)


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_relations_through_a_distiller_are_those_of_the_captured(model_type):
    teacher, student = tiny_model(model_type, layers=4), tiny_model(model_type, seed=1)
    batch = tiny_batch(teacher)
    loss = Distiller(teacher, student, "val_kl + qkv_kl(relation_heads=2)")(batch).loss
    ours = Capture(student, blocks=[0, 1])(**batch)
    theirs = Capture(teacher, blocks=[1, 3])(**batch)
    mask = batch["attention_mask"]
    values = [x.v for x in (ours, theirs)]
    expected = functional.value_relation_kl(
        list(values[0].values()), list(values[1].values()), mask, impl="eager"
    )
    for part in "qkv":
        x_s, x_t = getattr(ours, part)[1], getattr(theirs, part)[3]
        expected = expected + functional.relation_kl(
            x_s, x_s, x_t, x_t, mask, relation_heads=2, impl="eager"
        )
    torch.testing.assert_close(loss, expected, **CLOSE)
    loss.backward()
    for module in attention_modules(student):
        for name in projections(student):
            assert getattr(module, name).weight.grad.any()


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
@pytest.mark.parametrize("objective", ["att_kl", "att_mse", "att_pearson", "tinybert"])
def test_terms_on_maps_are_refused(model_type, objective):
    own, twin, other = tiny_model(model_type), tiny_model(model_type), tiny_model("bert")
    for models, side in (((own, twin), "student"), ((own, other), "teacher")):
        with pytest.raises(
            ValueError, match=rf"the {side} \({model_type}\) adds relative .*val_kl"
        ):
            Distiller(*models, objective)
    assert not describe(own).has_maps
    assert describe(other).has_maps


def test_deberta_with_a_convolution_is_refused():
    model = tiny_model("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(ValueError, match=r"conv_kernel_size=3.*is not supported"):
        describe(model)


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_a_compiled_student_gives_the_same_loss(model_type):
    teacher, student = tiny_model(model_type, layers=4), tiny_model(model_type, seed=1)
    batch = tiny_batch(teacher)
    expected = Distiller(teacher, student, "val_kl + hid_seq")(batch).loss
    compiled = torch.compile(student, backend="eager")
    distiller = Distiller(teacher, compiled, "val_kl + hid_seq")
    for _ in range(2):
        torch.testing.assert_close(distiller(batch).loss, expected, **CLOSE)


def test_adapters_of_the_projections_are_captured_too():
    model = tiny_model("mpnet")
    batch = tiny_batch(model)
    plain = Capture(model, blocks=[0])(**batch)

    class Adapted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1.0

    module = attention_modules(model)[0]
    module.v = Adapted(module.v)
    torch.testing.assert_close(Capture(model, blocks=[0])(**batch).v[0], plain.v[0] + 1.0)
