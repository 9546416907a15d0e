"""describe, base_model, block_list: every architecture, bare, with a head, wrapped."""

import pytest
import torch
from tiny_models import ALL_TYPES, tiny_batch, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel

from bertkd.encoders import (
    SUPPORTED,
    attention_modules,
    base_model,
    block_list,
    depth_field,
    describe,
    describe_config,
    last_norm,
    unwrap,
)
from bertkd.errors import UnsupportedEncoderError


def test_the_supported_types_are_those_with_tiny_models():
    assert sorted(SUPPORTED) == ALL_TYPES


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_sizes_are_those_the_forward_shows(model_type):
    model = tiny_model(model_type, layers=3, attn_implementation="eager")
    spec = describe(model)
    batch = tiny_batch(model, length=10)
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert spec.model_type == model_type
    assert spec.num_blocks == 3 == len(output.attentions)
    assert spec.num_heads == 4 == output.attentions[0].shape[1]
    assert spec.hidden_size == output.hidden_states[1].shape[-1] == 32
    assert spec.vocab_size == model.get_input_embeddings().weight.shape[0]
    # MobileBERT attends in a bottleneck of half the width.
    assert spec.head_dim == (4 if model_type == "mobilebert" else 8)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_blocks_run_in_the_order_listed(model_type):
    model = tiny_model(model_type, layers=3)
    ran = []
    for module in {*block_list(model), *attention_modules(model), base_model(model).embeddings}:
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    model(**tiny_batch(model))
    pairs = zip(block_list(model), attention_modules(model), strict=True)
    assert ran == [base_model(model).embeddings, *(module for pair in pairs for module in pair)]


@pytest.mark.parametrize(("layers", "groups"), [(4, 1), (4, 2), (4, 4), (5, 3), (18, 14)])
def test_albert_repeats_its_groups_as_the_forward_does(layers, groups):
    model = tiny_model("albert", layers=layers, num_hidden_groups=groups)
    ran = []
    for group in model.encoder.albert_layer_groups:
        group.albert_layers[0].register_forward_pre_hook(lambda module, args: ran.append(module))
    model(**tiny_batch(model))
    assert ran == block_list(model)
    assert len(set(ran)) == groups


@pytest.mark.parametrize("model_type", ALL_TYPES)
@pytest.mark.parametrize("head", ["sequence", "mlm"])
def test_head_is_stripped(model_type, head):
    model = tiny_model(model_type, head_cls=head)
    bare = base_model(model)
    assert bare is not model
    assert type(bare).__name__.endswith("Model")
    assert describe(model) == describe(bare) == describe_config(model.config)


def test_wrappers_are_looked_through():
    model = tiny_model("bert", head_cls="sequence")
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is unwrap(nn.DataParallel(model)) is model
    assert base_model(compiled) is base_model(nn.DataParallel(compiled)) is model.bert
    assert describe(compiled) == describe(model)
    bert = model.bert
    model.bert = torch.compile(bert, backend="eager")
    assert base_model(model) is bert
    assert block_list(model) is bert.encoder.layer


def test_the_first_version_of_fsdp_is_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(UnsupportedEncoderError, match="fully_shard"):
        describe(FullyShardedDataParallel())


def test_attention_is_found_in_blocks_compiled_one_by_one():
    model = tiny_model("bert")
    plain = attention_modules(model)
    model.encoder.layer[1] = torch.compile(model.encoder.layer[1], backend="eager")
    assert attention_modules(model) == plain


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_max_positions_is_the_longest_input_that_runs(model_type):
    model = tiny_model(model_type)
    longest = describe(model).max_positions
    if model_type in ("deberta-v2", "modernbert", "nomic_bert"):
        assert longest is None
        return
    model(**tiny_batch(model, batch=1, length=longest))
    with pytest.raises((IndexError, RuntimeError)):
        model(**tiny_batch(model, batch=1, length=longest + 1))


def test_depth_field_names_what_sets_the_depth():
    for model_type in ALL_TYPES:
        config = tiny_model(model_type).config
        setattr(config, depth_field(config), 5)
        assert describe_config(config).num_blocks == 5
    assert depth_field(AutoConfig.for_model("distilbert")) == "n_layers"


def test_only_modernbert_has_a_norm_after_its_blocks():
    found = [name for name in ALL_TYPES if last_norm(tiny_model(name)) is not None]
    assert found == ["modernbert"]


@pytest.mark.parametrize("model_type", ["deberta", "roformer", "funnel"])
def test_other_attentions_are_refused_with_a_list(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(
        UnsupportedEncoderError, match=rf"'{model_type}'.*modernbert, mpnet, nomic_bert"
    ):
        describe_config(config)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"got Linear.*model\[0\]\.auto_model"):
        describe(nn.Linear(2, 2))


def test_decoders_and_grouped_albert_are_refused():
    with pytest.raises(UnsupportedEncoderError, match="is_decoder=False"):
        describe_config(AutoConfig.for_model("bert", is_decoder=True))
    with pytest.raises(UnsupportedEncoderError, match="inner_group_num=2"):
        describe_config(AutoConfig.for_model("albert", inner_group_num=2))


def test_a_model_that_differs_from_its_config_is_refused():
    model = tiny_model("distilbert", layers=3)
    del model.transformer.layer[1]
    with pytest.raises(UnsupportedEncoderError, match=r"n_layers=3.* 2 blocks.*n_layers = 2"):
        describe(model)


def test_a_foreign_layout_under_a_known_name_is_refused():
    model = AutoModel.from_config(tiny_model("bert").config)
    model.config.model_type = "nomic_bert"
    with pytest.raises(UnsupportedEncoderError, match="trust_remote_code"):
        describe(model)
