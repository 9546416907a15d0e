"""What cannot work is refused when the Distiller is built, and the message says what to change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from tiny_models import tiny_batch, tiny_model
from torch import nn

from bertkd.distiller import Distiller
from bertkd.errors import UnsupportedEncoderError
from bertkd.objectives import TERMS, Needs, Term, read_objective, register_term
from bertkd.ops.implementations import has_op, unavailable
from bertkd.ops.verify import TENSORS


class Vocabulary:
    """As much of a tokenizer as is compared."""

    def __init__(self, *tokens):
        self.ids = {token: i for i, token in enumerate(tokens)}

    def get_vocab(self):
        return self.ids


def refused(objective, match, *, error=ValueError, teacher=None, student=None, **options):
    teacher = teacher or tiny_model("bert", layers=4)
    student = student or tiny_model("bert", layers=2, seed=1)
    with pytest.raises(error, match=match) as caught:
        Distiller(teacher, student, objective, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        ("att_lk", "unknown term 'att_lk'.*Did you mean 'att_kl'"),
        ("att_kl + tinybrt", "Did you mean 'tinybert'"),
        ("att_kl(mpa='last')", "unknown option of att_kl 'mpa'.*Did you mean 'map'"),
        ("ce(map='last')", "unknown option of ce"),
        ("minilm(map='last')", "takes no options; write its terms: att_kl"),
        ("distilbert@released", "no @released variant"),
        ("pool@released", "no @released variant"),
        ("att_kl(map='unifrom')", "term att_kl.*Did you mean 'uniform'"),
        ("att_kl(map='skip')", "for states only.*hid_seq.map='skip'"),
        ("att_kl(map=[(0, 4)])", "teacher block 4 is out of range"),
        ("att_kl(map=[(2, 3)])", "student block 2 is out of range"),
        ("hid_seq(map=[(0, 5)])", "teacher state 5 is out of range"),
        ("att_kl(reduction='max')", "unknown reduction"),
        ("att_kl(temperature=0)", "temperature must be a finite number above 0"),
        ("att_kl(temperature='2')", "temperature must be"),
        ("att_kl(count_pads=1)", "count_pads must be True or False"),
        ("att_kl(relation_heads=3)", "must divide the widths of both, 32 .* and 32"),
        ("att_kl(relation_heads='all')", "must be a whole number"),
        ("att_kl(min_prob=1e-7, impl='chunked')", "impl='eager' only"),
        ("att_kl(impl='chunked')@released", "impl='eager' only"),
        ("att_kl(min_prob=2)", "min_prob must be a probability below 1, got 2"),
        ("att_mse(min_score='x')", "min_score must be a number, got 'x'"),
        ("att_mse(min_score=True)", "min_score must be a number, got True"),
        ("att_mse(min_score=-100, impl='chunked')", "impl='eager' only"),
        ("att_mse(impl='chunky')", "unknown impl 'chunky'.*Did you mean 'chunked'"),
        ("val_kl(scale='teacher')", "unknown scale"),
        ("qkv_kl(teacher_block=4)", r"teacher_block must be one of 0\.\.3"),
        ("qkv_kl(student_block=-1)", r"student_block must be one of 0\.\.1"),
        ("att_pearson(relation_heads=2)", "no relation_heads"),
        ("att_pearson(axes='rows')", "unknown axes"),
        ("hid_seq(project='yes')", "project"),
        ("hid_seq(combine_on='both')", "unknown combine_on"),
        ("hid_cos(map='combine')", "combine"),
        ("pool(metric='l1')", "unknown metric"),
        ("pkd(map='random')", "no random map"),
        ("pkd(examples='max')", "unknown examples"),
        ("hid_cls_contrast", "pass num_examples"),
        ("hid_cls_contrast(mode='memory')", "unknown mode"),
        ("hid_cls_contrast(mode='batch', negatives=4)", "does nothing in mode='batch'"),
        ("hid_cls_contrast(mode='batch', map='random')", "no random map"),
        ("hid_cls_contrast(mode='queue', temperature=0)", "temperature"),
        ("kd", "kd needs logits, but the student is a bare encoder"),
        ("ce", "ce needs logits, but the student is a bare encoder"),
    ],
)
def test_options_that_cannot_work(objective, match):
    refused(objective, match)


def test_the_error_names_which_of_two_equal_terms_it_was():
    assert "term att_kl_2" in refused("att_kl + att_kl(map='0:9')", "out of range")


def test_differing_heads_suggest_relation_heads_and_qkv_kl():
    student = tiny_model("bert", layers=2, heads=2, seed=1)
    for term in ("att_kl", "att_mse", "val_kl"):
        message = refused(term, "student has 2 and the teacher 4", student=student)
        assert "relation_heads=2" in message
        assert "qkv_kl" in message
    message = refused("qkv_kl@released", "give qkv_kl relation_heads=2", student=student)
    assert "use qkv_kl" not in message
    good = "att_kl(relation_heads=2) + qkv_kl + qkv_kl(relation_heads=2)@released"
    Distiller(tiny_model("bert", layers=4), student, good)


@pytest.mark.parametrize("term", ["hid_seq", "hid_cls", "hid_cos", "pkd", "alp", "pool"])
def test_differing_widths_without_projection(term):
    student = tiny_model("bert", layers=2, hidden=16, seed=1)
    message = refused(f"{term}(project=False)", "needs equal widths", student=student)
    assert "16" in message
    assert "32" in message


def test_deeper_student():
    student = tiny_model("bert", layers=5, seed=1)
    for objective in ("att_kl", "hid_seq", "hid_seq(map='random')"):
        refused(objective, "no deeper than its teacher", student=student)


def test_one_block_student_of_pkd():
    refused("pkd", "leaves out the last block", student=tiny_model("bert", layers=1, seed=1))


def test_vocabulary_sizes():
    student = tiny_model("bert", layers=2, vocab_size=90, seed=1)
    refused("att_kl", r"vocabularies differ: 90 .* 200", student=student)


def test_tokenizers_are_compared_id_by_id():
    names = ("student_tokenizer", "teacher_tokenizer")
    same = dict(zip(names, (Vocabulary("a", "b"), Vocabulary("a", "b")), strict=True))
    student = tiny_model("bert", layers=2, vocab_size=90, seed=1)
    Distiller(tiny_model("bert", layers=4), student, "att_kl", **same)
    swapped = dict(zip(names, (Vocabulary("a", "b"), Vocabulary("b", "a")), strict=True))
    refused("att_kl", "'a' has id 0 .student. and 1", **swapped)
    shorter = dict(zip(names, (Vocabulary("a"), Vocabulary("a", "b")), strict=True))
    refused("att_kl", "'b' has id None .student. and 1", **shorter)
    refused("att_kl", "give both", teacher_tokenizer=Vocabulary("a"))
    many = Vocabulary(*map(str, range(100)))
    refused(
        "att_kl",
        "the student embeds only 90",
        student=student,
        student_tokenizer=many,
        teacher_tokenizer=many,
    )


def with_head(head_cls="sequence", layers=2, **overrides):
    return tiny_model("bert", layers=layers, head_cls=head_cls, **overrides)


@pytest.mark.parametrize(
    ("teacher", "student", "match"),
    [
        ({}, None, "the student is a bare encoder"),
        (None, {}, "the teacher is a bare encoder"),
        ({"num_labels": 4}, {}, "num_labels=3 .student. and 4"),
        (
            {"num_labels": 1},
            {"num_labels": 1, "head_cls": "mlm"},
            "sequence head and the student a mlm",
        ),
        ({"problem_type": "regression"}, {}, "same problem_type"),
        ({}, {"problem_type": "multi_label_classification"}, "multi_label"),
        (
            {"id2label": {0: "no", 1: "yes", 2: "maybe"}},
            {"id2label": {0: "yes", 1: "no", 2: "maybe"}},
            "in another order",
        ),
        (
            {"id2label": {0: "no", 1: "yes", 2: "maybe"}},
            {"id2label": {0: "bad", 1: "good", 2: "so"}},
            "under other names",
        ),
    ],
)
def test_logits_that_cannot_be_compared(teacher, student, match):
    make = [
        tiny_model("bert") if sizes is None else with_head(**sizes) for sizes in (teacher, student)
    ]
    refused("kd", match, teacher=make[0], student=make[1])


def test_labels_that_agree_but_for_case_or_placeholders_pass():
    teacher = with_head(id2label={0: "NO", 1: "YES", 2: "maybe"})
    for names in ({0: "no", 1: "yes", 2: "maybe"}, None):
        Distiller(teacher, with_head(seed=1, **({"id2label": names} if names else {})), "kd")


def test_shared_or_frozen_parameters():
    teacher = tiny_model("bert", layers=4)
    refused("att_kl", "share parameters", teacher=teacher, student=teacher)
    tied = tiny_model("bert", layers=2, seed=1)
    tied.embeddings = teacher.embeddings
    refused("att_kl", "share parameters", teacher=teacher, student=tied)
    frozen = tiny_model("bert", layers=2).requires_grad_(False)
    refused("att_kl", "no trainable parameter", student=frozen)


def test_models_without_weights():
    empty = tiny_model("bert", layers=4).to("meta")
    refused("att_kl", "teacher's weights are not loaded", teacher=empty)
    teacher = tiny_model("bert", layers=4)
    distiller = Distiller(teacher, tiny_model("bert", layers=2).to("meta"), "att_kl")
    assert teacher.device.type == "cpu"
    assert "att_kl" in str(distiller.plan())


def test_a_teacher_that_takes_no_mask():
    class Unmasked(type(tiny_model("bert"))):
        def forward(self, input_ids):
            return super().forward(input_ids)

    teacher = tiny_model("bert", layers=4)
    teacher.__class__ = Unmasked
    refused("att_kl", "the teacher's forward takes no attention_mask", teacher=teacher)


def test_models_that_are_no_supported_encoders():
    refused("att_kl", "Hugging Face", error=TypeError, teacher=nn.Linear(2, 2))
    strange = tiny_model("bert", layers=4)
    strange.config = copy.deepcopy(strange.config)
    strange.config.model_type = "deberta"
    refused("att_kl", "not supported", error=UnsupportedEncoderError, teacher=strange)


def test_batches_without_a_needed_column():
    teacher, student = with_head(layers=4), with_head(seed=1)
    batch = tiny_batch(teacher)
    with pytest.raises(ValueError, match="no 'labels'"):
        Distiller(teacher, student, "ce")(batch)
    with pytest.raises(ValueError, match="no 'index'"):
        Distiller(teacher, student, "hid_cls_contrast", num_examples=9)(batch)
    with pytest.raises(ValueError, match="no 'input_ids'"):
        Distiller(teacher, student, "kd")({})


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.tensor([0.0, 1.0, 2.0]), "labels are torch.float32.*num_labels=1"),
        (torch.zeros(3, 12, dtype=torch.long), r"shape \(3, 12\), but the logits need \(3,\)"),
    ],
)
def test_labels_of_another_task(labels, match):
    teacher, student = with_head(layers=4), with_head(seed=1)
    batch = {**tiny_batch(teacher), "labels": labels}
    with pytest.raises(ValueError, match=match):
        Distiller(teacher, student, "ce")(batch)


def test_a_refusal_leaves_the_teacher_as_it_was():
    teacher = tiny_model("bert", layers=4).train()
    refused("att_kl(map='0:9')", "out of range", teacher=teacher)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


def test_text_longer_than_the_positions():
    teacher = tiny_model("bert", layers=4, max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"9 tokens, but the teacher has 8.*truncation=True"):
        Distiller(teacher, tiny_model("bert", seed=1), "att_kl")(tiny_batch(teacher, length=9))


def test_every_option_of_every_term_is_known_by_name():
    for kind in TERMS:
        with pytest.raises(ValueError, match="unknown option"):
            read_objective(f"{kind}(no_such_option=1)")


def test_unread_weights_are_refused_with_the_place():
    message = refused("att_kl - hid_seq", "negative")
    assert message.splitlines()[2].strip() == "^"


@pytest.mark.parametrize("head", ["ForPreTraining", "ForQuestionAnswering"])
@pytest.mark.parametrize("objective", ["kd", "ce"])
def test_heads_without_rows_of_classes(head, objective):
    def model(seed):
        torch.manual_seed(seed)
        config = transformers.ElectraConfig(
            vocab_size=200, hidden_size=32, embedding_size=16, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64,
        )  # fmt: skip
        return getattr(transformers, f"Electra{head}")(config)

    refused(objective, "needs rows of logits over classes", teacher=model(0), student=model(1))


def test_every_known_term_is_named_once():
    names = refused("attkl", "unknown term").partition("Known: ")[2].partition(".")[0].split(", ")
    assert len(names) == len(set(names)) > 10


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_path_in_place_of_a_model(role):
    refused(
        "att_kl",
        rf"{role} must be a Hugging Face model, got 'bert-base'",
        error=TypeError,
        **{role: "bert-base"},
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"seed": "a"}, TypeError, "seed must be a whole number, got 'a'"),
        ({"layer_map": "unifrom"}, ValueError, "Did you mean 'uniform'"),
        ({"layer_map": None}, TypeError, "layer map must be text or pairs"),
        ({"num_examples": 2.5}, TypeError, "num_examples must be a whole number"),
    ],
)
def test_arguments_of_the_distiller(options, error, match):
    objective = "hid_cls_contrast" if "num_examples" in options else "hid_cls(map='last')"
    refused(objective, match, error=error, **options)


def test_pearson_does_not_suggest_an_option_that_it_lacks():
    student = tiny_model("bert", layers=2, hidden=16, heads=2)
    assert "relation_heads" not in refused("att_pearson", "use qkv_kl", student=student)
    refused("att_pearson(relation_heads=2)", "has no relation_heads")


@pytest.mark.parametrize(
    "rates",
    [{"lr": -1e-3}, {"lr": "1e-3"}, {"projection_lr": math.nan}, {"weight_decay": None}],
)
def test_rates_that_torch_would_take_from_groups_without_a_word(rates):
    distiller = Distiller(tiny_model("bert", layers=4), tiny_model("bert", seed=1), "att_kl")
    with pytest.raises(ValueError, match=f"{next(iter(rates))} must be a finite number"):
        distiller.parameter_groups(**{"lr": 1e-3, **rates})


@pytest.mark.parametrize("objective", ["att_kl", "att_mse"])
def test_blocks_of_different_softmax_scales_are_refused(objective):
    teacher, student = tiny_model("bert", layers=4), tiny_model("bert", seed=1)
    distiller = Distiller(teacher, student, objective)
    teacher.encoder.layer[3].attention.self.scaling *= 2
    with pytest.raises(ValueError, match=rf"{objective} compares blocks with one softmax scale"):
        distiller(tiny_batch(teacher))


@pytest.mark.skipif(unavailable("native") is not None, reason="the native kernels are not built")
@pytest.mark.parametrize(
    ("objective", "lacking"),
    [
        ("att_kl + hid_cos", "term hid_cos: .* has no hidden_cosine; use 'auto'"),
        ("hid_seq(project=True)", "term hid_seq: .* has no hidden_proj_mse"),
        ("hid_seq(map='combine')@released", "term hid_seq: .* has no hidden_combine_mse"),
        ("att_kl + att_mse + val_kl + qkv_kl + hid_seq + hid_cls", None),
        ("hid_cos(impl='chunked') + att_kl@released + att_pearson + pool", None),
    ],
)
def test_an_implementation_that_lacks_a_terms_op(objective, lacking, monkeypatch):
    if lacking is not None:
        refused(objective, lacking, impl="native")
        monkeypatch.setenv("BERTKD_IMPL", "native")
        refused(objective, "BERTKD_IMPL=native cannot be used: it " + lacking.rpartition(".* ")[2])
        return
    teacher, student = tiny_model("bert", layers=4), tiny_model("bert", layers=2, seed=1)
    assert Distiller(teacher, student, objective, impl="native")(tiny_batch(teacher)).loss > 0


def test_cuda_has_some_ops_and_triton_all():
    assert has_op("cuda", "self_relation_kl")
    assert not has_op("cuda", "attention_mse")
    assert all(has_op("triton", op) and has_op("chunked", op) for op in TENSORS)


def test_a_term_that_lacks_a_method_is_refused_where_it_is_registered():
    class Unplanned(Term):
        kind = "unplanned"

        def needs(self):
            return Needs()

        def forward(self, step):
            return torch.zeros(())

    # Without its bytes everything would work up to the first plan.
    with pytest.raises(TypeError, match="term 'unplanned': Unplanned does not define memory;"):
        register_term(Unplanned)
    assert "unplanned" not in TERMS
