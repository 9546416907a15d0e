"""Captured tensors against what Hugging Face's eager model says of itself."""

import pytest
import torch
from tiny_models import ALL_TYPES, MODEL_TYPES, tiny_batch, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from bertkd.capture import Capture
from bertkd.encoders import block_list
from bertkd.errors import UnsupportedEncoderError

EVERY = range(3)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
OUTPUT_PROJECTION = {
    "albert": "attention.dense",
    "distilbert": "attention.out_lin",
    "modernbert": "attn.Wo",
    "nomic_bert": "self_attn.o_proj",
}


def map_of(recording, block, mask):
    """softmax(q k^T scale + mask) (B, H, L, L), from the definition."""
    q, k = recording.q[block], recording.k[block]
    scores = q @ k.mT * recording.scale[block]
    allowed = mask.bool()[:, None, None, :]
    if (window := recording.window[block]) is not None:
        place = torch.arange(q.shape[2])
        allowed = allowed & ((place[:, None] - place[None, :]).abs() <= window)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def real_rows(tensor, mask, dim):
    """Keep the rows of real tokens: those of pads may attend to nothing in a sliding window."""
    return tensor.movedim(dim, 1)[mask.bool()]


def contexts_of(model, batch):
    """What enters each block's output projection, (B, L, H * D): its map times v."""
    path = OUTPUT_PROJECTION.get(model.config.model_type, "attention.output.dense")
    seen = []
    for block in dict.fromkeys(block_list(model)):
        block.get_submodule(path).register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
    model(**batch)
    return seen


@pytest.mark.parametrize("padding", ["right", "left", "ragged"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_everything_equals_the_eager_model(model_type, padding):
    overrides = {"local_attention": 8} if model_type == "modernbert" else {}
    model = tiny_model(model_type, layers=3, **overrides)
    eager = tiny_model(model_type, layers=3, attn_implementation="eager", **overrides)
    batch = tiny_batch(model, padding=padding)
    mask = batch["attention_mask"]
    with torch.no_grad():
        recording = Capture(model, blocks=EVERY, states=range(4))(**batch)
        truth = eager(**batch, output_attentions=True, output_hidden_states=True)
        contexts = contexts_of(eager, batch)

    for block in EVERY:
        attention = map_of(recording, block, mask)
        want = truth.attentions[block]
        torch.testing.assert_close(real_rows(attention, mask, 2), real_rows(want, mask, 2), **CLOSE)
        context = (want @ recording.v[block]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            real_rows(context, mask, 1), real_rows(contexts[block], mask, 1), **CLOSE
        )
    assert len(truth.hidden_states) == 4
    for index, want in enumerate(truth.hidden_states):
        state = recording.states[index]
        torch.testing.assert_close(real_rows(state, mask, 1), real_rows(want, mask, 1), **CLOSE)
    assert recording.window[1] == (4 if model_type == "modernbert" else None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_eager_model_is_captured_bit_for_bit(model_type):
    model = tiny_model(model_type, layers=3, attn_implementation="eager")
    batch = tiny_batch(model, padding=None)
    flags = {"output_attentions": True, "output_hidden_states": True}
    truth = model(**batch, **flags)
    recording = Capture(model, blocks=EVERY, states=range(4))(**batch, **flags)
    output = recording.output
    for block in EVERY:
        assert torch.equal(output.attentions[block], truth.attentions[block])
        scores = recording.q[block] @ recording.k[block].mT * recording.scale[block]
        assert torch.equal(scores.softmax(-1), truth.attentions[block])
    for index in range(4):
        assert torch.equal(recording.states[index], truth.hidden_states[index])
    assert torch.equal(output.last_hidden_state, truth.last_hidden_state)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_only_the_wanted_is_kept(model_type):
    model = tiny_model(model_type, layers=4)
    batch = tiny_batch(model)
    everything = Capture(model, blocks=range(4), states=range(5))(**batch)
    recording = Capture(model, blocks=[3, 1], states=(2,))(**batch)
    for kind in ("q", "k", "v", "scale", "window"):
        assert list(getattr(recording, kind)) == [1, 3]
    assert list(recording.states) == [2]
    for block in (1, 3):
        assert torch.equal(recording.q[block], everything.q[block])
    assert torch.equal(recording.states[2], everything.states[2])
    assert not torch.equal(everything.states[2], everything.states[3])


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_a_head_models_output_is_its_own(model_type):
    model = tiny_model(model_type, head_cls="sequence", num_labels=5)
    batch = tiny_batch(model)
    recording = Capture(model, blocks=[1])(**batch)
    assert torch.equal(recording.output.logits, model(**batch).logits)
    assert recording.output.hidden_states is None
    positional = Capture(model, blocks=[1])(batch["input_ids"], batch["attention_mask"])
    assert positional.q[1].shape == recording.q[1].shape


def test_record_lets_the_caller_run_the_model():
    model = tiny_model("roberta", head_cls="mlm")
    batch = tiny_batch(model)
    with Capture(model, blocks=[0], states=[2]).record() as recording:
        assert recording.q == {}
        logits = model(**batch).logits
        assert list(recording.q) == [0]
    same = Capture(model, blocks=[0], states=[2])(**batch)
    assert torch.equal(recording.q[0], same.q[0])
    assert torch.equal(recording.states[2], same.states[2])
    assert torch.equal(logits, same.output.logits)
    assert recording.output is None


def test_the_models_own_implementation_does_the_work():
    """A registered implementation is called, under its own name, with the mask made for it."""
    seen = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        seen.append((module.config._attn_implementation, attention_mask))
        output = torch.zeros_like(query).transpose(1, 2)
        return output, None

    def make_mask(**kwargs):
        return "the mask"

    AttentionInterface.register("probe", attend)
    AttentionMaskInterface.register("probe", make_mask)
    try:
        model = tiny_model("bert")
        model.config._attn_implementation = "probe"
        batch = tiny_batch(model)
        recording = Capture(model, blocks=[0])(**batch)
        assert seen == [("probe", "the mask")] * 2
        assert torch.equal(recording.output[0], model(**batch)[0])
        # Registered anew under the same name: the new function is the one to be called.
        AttentionInterface.register("probe", lambda *args, **kwargs: (seen.append("new"), None))
        seen.clear()
        with pytest.raises(AttributeError):
            Capture(model, blocks=[0])(**batch)
        assert seen == ["new"]
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            for name in ("probe", "bertkd-probe"):
                interface._global_mapping.pop(name, None)


def test_sdpa_stays_sdpa(monkeypatch):
    calls = []
    plain = nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    model = tiny_model("distilbert", layers=3)
    Capture(model, blocks=[0])(**tiny_batch(model))
    assert len(calls) == 3


@pytest.mark.parametrize("model_type", ["deberta", "roformer"])
def test_encoders_with_their_own_attention_are_refused(model_type):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 16}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes))
    with pytest.raises(
        UnsupportedEncoderError, match=f"{model_type}.*Supported: albert, bert.*functional"
    ):
        Capture(model, blocks=[0])


def test_bad_indices_are_refused():
    model = tiny_model("bert", layers=3)
    with pytest.raises(ValueError, match=r"blocks must lie in 0\.\.2, got 3, 7"):
        Capture(model, blocks=[0, 7, 3])
    with pytest.raises(ValueError, match=r"states must lie in 0\.\.3, got -1 .*embedding"):
        Capture(model, states=[-1])
    for wrong in ([0.5], 2):
        with pytest.raises(TypeError, match="blocks must be whole numbers such as"):
            Capture(model, blocks=wrong)
    Capture(model, states=[3], blocks=torch.arange(2))


def test_data_parallel_is_refused_with_advice():
    model = nn.DataParallel(tiny_model("bert"))
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        Capture(model, blocks=[0])


def test_an_unregistered_implementation_is_refused():
    model = tiny_model("bert")
    model.config._attn_implementation = "flash_attention_9"
    with pytest.raises(ValueError, match=r"flash_attention_9.*sdpa"):
        Capture(model, blocks=[0])(**tiny_batch(model))


def test_only_the_parts_asked_for_are_kept():
    model = tiny_model("bert")
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    whole = Capture(model, blocks=[0, 1])(**inputs)
    some = Capture(model, blocks=[0, 1], parts="kv")(**inputs)
    assert not some.q
    assert torch.equal(some.k[1], whole.k[1])
    assert torch.equal(some.v[0], whole.v[0])
    assert some.scale == whole.scale
    # It still knows when it has seen everything.
    assert Capture(model, blocks=[0], parts="v")(stop_early=True, **inputs).output is None
    for wrong in ("", "x", "qz"):
        with pytest.raises(ValueError, match="parts must be letters of 'qkv'"):
            Capture(model, blocks=[0], parts=wrong)
