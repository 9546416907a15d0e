"""Students against their teachers: bit-identical copies, truncated teachers, round trips."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from model_outputs import outputs
from tiny_models import ALL_TYPES, tiny_batch, tiny_model
from torch import Tensor, nn

from bertkd import encoders
from bertkd.errors import UnsupportedEncoderError
from bertkd.narrow import SLICEABLE
from bertkd.student import create_student, teacher_layers

UNSHARED = [name for name in ALL_TYPES if name != "albert"]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("head_cls", [None, "sequence", "mlm"])
@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_full_copy_is_bit_identical(model_type: str, head_cls: str | None) -> None:
    teacher = tiny_model(model_type, layers=3, head_cls=head_cls)
    before = snapshot(teacher)
    student = create_student(teacher, "first:3", copy_head=True, verbose=False)
    assert type(student) is type(teacher)
    assert not student.training
    assert_same(outputs(student, padding="ragged"), outputs(teacher, padding="ragged"))
    after = snapshot(teacher)
    assert before.keys() == after.keys() == snapshot(student).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_copy_in_bfloat16() -> None:
    for model_type in ("bert", "modernbert"):
        teacher = tiny_model(model_type, head_cls="sequence", dtype=torch.bfloat16)
        student = create_student(
            teacher, "first:2", copy_head=True, dtype=torch.bfloat16, verbose=False
        )
        assert student.dtype == torch.bfloat16
        kinds = {name: t.dtype for name, t in snapshot(teacher).items()}
        assert kinds == {name: t.dtype for name, t in snapshot(student).items()}
        assert_same(outputs(student), outputs(teacher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_student_of_a_half_precision_teacher_can_be_trained(dtype, capsys) -> None:
    teacher = tiny_model("modernbert", head_cls="sequence", dtype=dtype)
    student = create_student(teacher, "first:2", copy_head=True)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in student.parameters()} == {wanted}
    assert student.config.dtype == wanted
    assert f"parameters in {str(wanted)[6:]}\n" in capsys.readouterr().out
    for copied, original in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(copied, original.to(wanted))


def cut_blocks(teacher: nn.Module, kept: list[int]) -> nn.Module:
    """The teacher with its other blocks taken out by hand."""
    teacher = copy.deepcopy(teacher)
    blocks = encoders.block_list(teacher)
    for layer in reversed(range(len(blocks))):
        if layer not in kept:
            del blocks[layer]
    return teacher


@pytest.mark.parametrize("kept", [[0, 2, 3], [0, 3], [0]])
@pytest.mark.parametrize("model_type", UNSHARED)
def test_shallower_student_is_the_teacher_without_the_other_blocks(
    model_type: str, kept: list[int]
) -> None:
    # A window of 2 makes ModernBERT's local and global blocks differ.
    window = {"local_attention": 2} if model_type == "modernbert" else {}
    teacher = tiny_model(model_type, layers=4, head_cls="sequence", **window)
    student = create_student(teacher, kept, copy_head=True, verbose=False)
    assert encoders.describe(student).num_blocks == len(kept)
    assert_same(outputs(student), outputs(cut_blocks(teacher, kept)))


@pytest.mark.parametrize("model_type", UNSHARED)
def test_blocks_come_from_the_chosen_ones(model_type: str) -> None:
    teacher = tiny_model(model_type, layers=4)
    student = create_student(teacher, "uniform:2", verbose=False)
    sources = encoders.block_list(teacher)
    for block, layer in zip(encoders.block_list(student), [1, 3], strict=True):
        weights = sources[layer].state_dict()
        assert all(torch.equal(t, weights[name]) for name, t in block.state_dict().items())


def test_modernbert_blocks_keep_their_kind(tmp_path) -> None:
    teacher = tiny_model("modernbert", layers=4, head_cls="sequence", local_attention=2)
    kinds = teacher.config.layer_types
    assert kinds == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    for kept in ([1, 2], [0, 3], [1, 3]):
        student = create_student(teacher, kept, verbose=False)
        assert student.config.layer_types == [kinds[i] for i in kept]
        student.save_pretrained(tmp_path)
        again = type(student).from_pretrained(tmp_path)
        assert [block.attention_type for block in again.model.layers] == [kinds[i] for i in kept]
        assert_same(outputs(again), outputs(student))


def test_modernbert_says_that_its_first_norm_is_lost(capsys) -> None:
    teacher = tiny_model("modernbert", layers=4)
    create_student(teacher, [1, 3])
    assert "block 0    <- block 1, without attn_norm.weight" in capsys.readouterr().out


def test_albert_changes_depth_only() -> None:
    teacher = tiny_model("albert", layers=4, head_cls="sequence")
    student = create_student(teacher, "uniform:2", copy_head=True, verbose=False)
    assert student.config.num_hidden_layers == 2
    by_hand = copy.deepcopy(teacher)
    by_hand.albert.encoder.config.num_hidden_layers = 2
    assert_same(outputs(student), outputs(by_hand))
    grouped = tiny_model("albert", layers=4, num_hidden_groups=2)
    create_student(grouped, [1, 2], verbose=False)
    with pytest.raises(ValueError, match=r"2 groups.*cannot run groups \[0, 0\]"):
        create_student(grouped, [0, 1])


@pytest.mark.parametrize("model_type", ["albert", "bert", "modernbert"])
def test_nothing_is_shared_and_gradients_flow(model_type: str) -> None:
    teacher = tiny_model(model_type, head_cls="sequence").requires_grad_(False)
    before = outputs(teacher)
    student = create_student(teacher, "first:1", copy_head=True, verbose=False)
    places = {t.untyped_storage().data_ptr() for t in teacher.state_dict().values()}
    assert places.isdisjoint(t.untyped_storage().data_ptr() for t in student.state_dict().values())
    student(**tiny_batch(student, labels=True)).loss.backward()
    assert all(p.requires_grad for p in student.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.num_labels = 7
    assert_same(outputs(teacher), before)
    assert teacher.config.num_labels == 3
    assert teacher.config.num_hidden_layers == 2


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_decoder_stays_tied(model_type: str) -> None:
    teacher = tiny_model(model_type, head_cls="mlm")
    for copy_head in (False, True):
        student = create_student(teacher, "last:1", copy_head=copy_head, verbose=False)
        embedding = student.get_input_embeddings().weight
        assert student.get_output_embeddings().weight is embedding
        assert torch.equal(embedding, teacher.get_input_embeddings().weight)


def test_untied_decoder_is_part_of_the_head() -> None:
    teacher = tiny_model("bert", head_cls="mlm", tie_word_embeddings=False)
    decoder = teacher.get_output_embeddings().weight
    copied = create_student(teacher, "last:1", copy_head=True, verbose=False)
    assert torch.equal(copied.get_output_embeddings().weight, decoder)
    fresh = create_student(teacher, "last:1", verbose=False)
    assert not torch.equal(fresh.get_output_embeddings().weight, decoder)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert"])
def test_new_head_depends_on_the_seed_alone(model_type: str) -> None:
    teacher = tiny_model(model_type, head_cls="sequence")

    def head(seed: int) -> Tensor:
        student = create_student(teacher, "first:1", seed=seed, verbose=False)
        matrices = [p for p in student.classifier.parameters() if p.ndim == 2]
        return torch.cat([p.detach().flatten() for p in matrices])

    first = head(0)
    torch.rand(3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(head(0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(head(1), first)
    theirs = [p.flatten() for p in teacher.classifier.parameters() if p.ndim == 2]
    assert not torch.equal(first, torch.cat(theirs))


def test_number_of_labels() -> None:
    names = {0: "no", 1: "yes", 2: "maybe"}
    teacher = tiny_model(
        "bert",
        head_cls="sequence",
        id2label=names,
        label2id={name: i for i, name in names.items()},
        problem_type="multi_label_classification",
    )
    student = create_student(teacher, "first:1", num_labels=1, verbose=False)
    assert student.classifier.weight.shape == (1, 32)
    assert student.num_labels == student.config.num_labels == len(student.config.id2label) == 1
    assert student.config.problem_type is None
    assert teacher.config.problem_type == "multi_label_classification"
    same = create_student(teacher, "first:1", num_labels=3, copy_head=True, verbose=False)
    assert torch.equal(same.classifier.weight, teacher.classifier.weight)
    assert same.config.id2label == names
    with pytest.raises(ValueError, match=r"copy_head=True keeps the teacher's 3 labels"):
        create_student(teacher, "first:1", num_labels=2, copy_head=True)
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        create_student(teacher, "first:1", num_labels=0)
    with pytest.raises(ValueError, match="num_labels needs a teacher with a task head"):
        create_student(teacher.bert, "first:1", num_labels=2)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_save_and_load(model_type: str, tmp_path) -> None:
    teacher = tiny_model(model_type, layers=4, head_cls="sequence")
    narrow = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    for widths in ({}, narrow) if model_type in SLICEABLE else ({},):
        student = create_student(teacher, "uniform:2", num_labels=5, verbose=False, **widths)
        student.save_pretrained(tmp_path)
        again = type(teacher).from_pretrained(tmp_path)
        spec = encoders.describe(again)
        assert (spec.num_blocks, len(encoders.block_list(again)), again.num_labels) == (2, 2, 5)
        assert spec == encoders.describe(student)
        assert_same(outputs(again), outputs(student))


def test_a_teacher_without_pooler_has_a_student_without() -> None:
    teacher = tiny_model("bert")
    bare = type(teacher)(copy.deepcopy(teacher.config), add_pooling_layer=False).eval()
    student = create_student(bare, "first:2", verbose=False)
    assert student.pooler is None
    assert_same(outputs(student), outputs(bare))


def test_wrapped_teachers() -> None:
    teacher = tiny_model("bert", head_cls="sequence")
    expected = outputs(create_student(teacher, "first:1", copy_head=True, verbose=False))
    inside = copy.deepcopy(teacher)
    inside.bert.encoder.layer[0] = torch.compile(inside.bert.encoder.layer[0])
    wholly = torch.compile(copy.deepcopy(teacher))
    base = copy.deepcopy(teacher)
    base.bert = torch.compile(base.bert)
    for wrapped in (inside, wholly, base, nn.DataParallel(teacher)):
        student = create_student(wrapped, "first:1", copy_head=True, verbose=False)
        assert type(student) is type(teacher)
        assert_same(outputs(student), expected)


def test_the_table_is_printed_or_logged(capsys, caplog) -> None:
    teacher = tiny_model("bert", layers=4, head_cls="sequence")
    create_student(teacher, "uniform:2", hidden_size=16)
    table = capsys.readouterr().out
    for line in ("2 of 4 blocks", "hidden size 16 of 32", "block 0    <- block 1\n"):
        assert line in table
    for line in ("block 1    <- block 3\n", "pooler     <- pooler\n", "classifier <- new (seed 0)"):
        assert line in table
    with caplog.at_level(logging.INFO, logger="bertkd"):
        create_student(teacher, "uniform:2", copy_head=True, verbose=False)
    assert capsys.readouterr().out == ""
    assert "classifier <- classifier" in caplog.text
    create_student(tiny_model("bert", head_cls="mlm"), "first:1")
    assert "cls.predictions.decoder.weight <- tied to the embeddings" in capsys.readouterr().out


def test_unsupported_teachers() -> None:
    from transformers import GPT2Config, GPT2Model

    gpt2 = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(UnsupportedEncoderError, match="gpt2"):
        create_student(gpt2, "first:1")
    with pytest.raises(TypeError, match="Hugging Face"):
        create_student(nn.Linear(2, 2), "first:1")


def test_teachers_without_weights_to_copy() -> None:
    teacher = tiny_model("bert")
    with torch.device("meta"):
        hollow = type(teacher)(teacher.config)
    with pytest.raises(UnsupportedEncoderError, match=r"not loaded, 'embeddings.*'meta'"):
        create_student(hollow, "first:1")
    partly = copy.deepcopy(teacher)
    partly.encoder.layer[1].output.dense.to("meta")
    with pytest.raises(UnsupportedEncoderError, match=r"'encoder.layer.1.output.*'meta'"):
        create_student(partly, "first:1")
    # As bitsandbytes keeps 4 bits: integers of another shape.
    packed = copy.deepcopy(teacher)
    weight = torch.zeros(512, 1, dtype=torch.uint8)
    packed.encoder.layer[0].output.dense.weight = nn.Parameter(weight, requires_grad=False)
    # As PyTorch's dynamic quantisation does: no tensor at all in the state dict.
    foreign = copy.deepcopy(teacher)
    foreign.encoder.layer[0].register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"{prefix}packed": (1, 2)})
    )
    for quantised in (packed, foreign):
        with pytest.raises(UnsupportedEncoderError, match=r"quantised.*load it in float32"):
            create_student(quantised, "first:1")


@pytest.mark.parametrize("value", [2.0, "2", True])
def test_numbers_that_are_not_whole(value: object) -> None:
    teacher = tiny_model("bert", head_cls="sequence")
    for name in ("hidden_size", "num_heads", "intermediate_size", "num_labels", "seed"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got {value!r}"):
            create_student(teacher, "first:1", **{name: value})


def test_numbers_of_numpy(tmp_path) -> None:
    teacher = tiny_model("bert", head_cls="sequence")
    options = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "num_labels": 2}
    options = {name: np.int64(value) for name, value in options.items()}
    student = create_student(teacher, "first:1", verbose=False, **options)
    student.save_pretrained(tmp_path)
    assert type(student).from_pretrained(tmp_path).config.hidden_size == 16


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("first:3", [0, 1, 2]),
        ("last:3", [9, 10, 11]),
        ("uniform:3", [3, 7, 11]),
        ("uniform:5", [1, 4, 6, 9, 11]),
        (" uniform : 12 ", list(range(12))),
        ("[0, 7, 11]", [0, 7, 11]),
        ("0,7,11", [0, 7, 11]),
        ("[4]", [4]),
        ([0, 7, 11], [0, 7, 11]),
        ((3,), [3]),
        (range(0, 12, 4), [0, 4, 8]),
        ([np.int64(0), np.int64(7)], [0, 7]),
    ],
)
def test_teacher_layers(spec: object, expected: list[int]) -> None:
    assert teacher_layers(spec, 12) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom:3", r"Did you mean 'uniform:<n>'"),
        ("3", r"unknown layers '3'.*a list such as"),
        ("uniform", r"write 'uniform:<n>', n from 1 to 12"),
        ("first:0", r"n from 1 to 12"),
        ("last:13", r"n from 1 to 12"),
        ("first:two", r"n from 1 to 12"),
        ("first:-1", r"n from 1 to 12"),
        ("[0, x]", r"cannot read layers"),
        ("[0, 7", r"cannot read layers"),
        ("[0,, 7]", r"cannot read layers"),
        ("[]", r"empty"),
        ([], r"empty"),
        ([0, 12], r"no block 12, its blocks are 0..11 \(numbers are 0-based"),
        ([-1], r"no block -1"),
        ("4,8,12", r"no block 12"),
        ([3, 3], r"strictly increasing"),
        ([7, 3], r"strictly increasing"),
    ],
)
def test_teacher_layers_refused(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_layers(spec, 12)


@pytest.mark.parametrize("spec", [3, None, [1.0], [True], {0: 1}, b"first:2"])
def test_teacher_layers_of_a_wrong_type(spec: object) -> None:
    with pytest.raises(TypeError, match=r"layers must be text such as 'uniform:3' or a list"):
        teacher_layers(spec, 12)
