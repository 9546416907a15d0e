"""The Distiller: a frozen teacher, inputs, early stops, precision, resuming, compilation."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from tiny_models import ALL_TYPES, OWN_ATTENTION, tiny_batch, tiny_model

from bertkd.distiller import Distiller
from bertkd.errors import NonFiniteError

BOTH = "att_kl + hid_seq"


def models(head_cls=None, **student):
    teacher = tiny_model("bert", layers=4, head_cls=head_cls)
    return teacher, tiny_model("bert", **{"layers": 2, "seed": 1, "head_cls": head_cls, **student})


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_the_teacher_is_frozen_in_eval_and_no_part_of_the_module():
    teacher, student = models()
    teacher.train()
    distiller = Distiller(teacher, student, BOTH)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert distiller.teacher is teacher
    inside = {id(p) for p in distiller.parameters()} | {id(m) for m in distiller.modules()}
    assert not inside & {id(x) for x in (*teacher.parameters(), *teacher.modules())}
    assert all(name.startswith(("student.", "objective.")) for name in distiller.state_dict())
    distiller.train()
    assert student.training
    assert not teacher.training


def test_a_teacher_woken_by_hand_is_put_back_to_sleep():
    teacher = tiny_model("bert", layers=4, hidden_dropout_prob=0.5)
    distiller = Distiller(teacher, tiny_model("bert", seed=1), BOTH)
    batch = tiny_batch(teacher)
    expected = distiller(batch).loss
    teacher.train()
    assert torch.equal(distiller(batch).loss, expected)
    assert not any(m.training for m in teacher.modules())
    teacher.encoder.layer[1].train()
    assert torch.equal(distiller(batch).loss, expected)


@pytest.mark.parametrize(
    ("objective", "parts"),
    [("att_kl", "qk"), ("att_mse", "qk"), ("val_kl", "v"), ("qkv_kl", "qkv"), (BOTH, "qk"), ("hid_seq", "")],
)  # fmt: skip
def test_what_no_term_reads_of_the_teacher_is_not_kept(objective, parts):
    distiller = Distiller(*models(), objective)
    batch = tiny_batch(distiller.teacher)
    found = distiller._record_teacher(batch, distiller.objective.needs())
    assert [part for part in "qkv" if getattr(found, part)] == list(parts)


def test_moving_takes_the_teacher_along_but_leaves_its_dtype():
    teacher, student = models()
    teacher.bfloat16()
    distiller = Distiller(teacher, student, BOTH)
    distiller.to(torch.float64)
    assert student.dtype == torch.float64
    assert teacher.dtype == torch.bfloat16
    distiller.to("meta")
    assert teacher.device.type == "cpu"  # nothing could bring it back from there
    assert copy.deepcopy(Distiller(*models(), BOTH)).teacher is not teacher


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_every_supported_encoder_distils_into_half_its_depth(model_type):
    teacher = tiny_model(model_type, layers=4)
    student = tiny_model(model_type, layers=2, seed=1)
    term = "val_kl" if model_type in OWN_ATTENTION else "att_kl"
    distiller = Distiller(teacher, student, f"{term} + hid_seq(map='skip') + qkv_kl").train()
    loss = distiller(tiny_batch(teacher)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_models_get_only_what_their_forward_takes():
    teacher = tiny_model("bert", layers=2)
    student = tiny_model("distilbert", layers=2, seed=1)
    batch = tiny_batch(teacher, labels=True) | {"index": torch.arange(3), "text": ["a", "b", "c"]}
    assert "token_type_ids" in batch
    distiller = Distiller(teacher, student, BOTH)
    loss = distiller(batch).loss
    seen = {}
    teacher.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    student.register_forward_pre_hook(lambda m, a, k: seen.update(s=set(k)), with_kwargs=True)
    assert torch.equal(distiller(batch).loss, loss)
    assert set(seen) - {"s"} == {"input_ids", "attention_mask", "token_type_ids"}
    assert seen["s"] == {"input_ids", "attention_mask"}
    del batch["token_type_ids"]
    assert not torch.equal(distiller(batch).loss, loss)


def test_labels_never_reach_the_models_own_losses():
    teacher, student = models("sequence")
    seen = set()
    for model in (teacher, student):
        model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    Distiller(teacher, student, "kd + ce")(tiny_batch(teacher, labels=True))
    assert seen == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_batch_may_be_a_batch_encoding_without_mask():
    from transformers import BatchEncoding

    teacher, student = models()
    batch = tiny_batch(teacher, padding=None)
    expected = Distiller(teacher, student, BOTH)(batch).loss
    assert torch.equal(Distiller(teacher, student, BOTH)(BatchEncoding(batch)).loss, expected)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(Distiller(teacher, student, BOTH)(batch).loss, expected)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_both_models_stop_after_the_last_matched_layer_unless_logits_are_needed():
    teacher, student = models("sequence")
    heads = [count_calls(teacher.classifier), count_calls(student.classifier)]
    upper = count_calls(teacher.bert.encoder.layer[3].output)
    batch = tiny_batch(teacher, labels=True)
    output = Distiller(teacher, student, "att_kl(map='0:1')")(batch)
    assert output.logits is None
    assert not any(heads) and not upper  # noqa: PT018
    output = Distiller(teacher, student, "att_kl + kd")(batch)
    assert output.logits.shape == (3, 3)
    assert not output.logits.requires_grad
    assert [len(calls) for calls in heads] == [1, 1]


def test_the_teacher_is_not_run_where_no_term_asks_for_it():
    teacher, student = models("sequence")
    calls = count_calls(teacher.bert.embeddings)
    output = Distiller(teacher, student, "ce")(tiny_batch(teacher, labels=True))
    assert output.logits is not None
    assert not calls


def test_nothing_captured_outlives_the_step():
    teacher, student = models()
    distiller = Distiller(teacher, student, BOTH)
    kept = []
    hook = student.encoder.layer[0].register_forward_hook(
        lambda m, a, out: kept.append(weakref.ref(out[0] if isinstance(out, tuple) else out))
    )
    output = distiller(tiny_batch(teacher))
    hook.remove()
    output.loss.backward()
    del output
    gc.collect()
    assert kept
    assert kept[0]() is None


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtypes_of_teacher_and_student_may_differ(dtypes):
    teacher, student = models()
    batch = tiny_batch(teacher)
    exact = Distiller(teacher, student, f"{BOTH} + pool + pkd + alp")(batch).loss
    teacher, student = (
        m.to(getattr(torch, d)) for m, d in zip((teacher, student), dtypes, strict=True)
    )
    loss = Distiller(teacher, student, f"{BOTH} + pool + pkd + alp")(batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    loss.backward()


@pytest.mark.parametrize("narrow", [False, True])
def test_losses_are_computed_in_float32_under_autocast(narrow):
    teacher, student = models("sequence", **({"hidden": 16} if narrow else {}))
    objective = "att_kl + hid_seq + hid_cos + att_pearson + alp + pool + kd + ce"
    distiller = Distiller(teacher, student, objective + " + hid_cls_contrast(mode='queue')")
    batch = tiny_batch(teacher, labels=True)
    exact = distiller.eval()(batch)
    inside = []
    for term in distiller.objective.terms.values():
        term.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        output = distiller(batch)
    assert inside == [False] * 9
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.05, atol=0)
    output.loss.backward()


@pytest.mark.parametrize(
    ("objective", "power"), [("hid_cls + pkd + alp + pool", 0), (BOTH, 1), ("att_mse", 2)]
)
def test_accumulated_parts_are_weighed_by_what_they_share(objective, power):
    """By sentences, by tokens, by pairs of tokens."""
    teacher, student = models()
    distiller = Distiller(teacher, student, objective)
    batch = tiny_batch(teacher, batch=4)
    distiller(batch).loss.backward()
    whole = gradients(distiller)
    distiller.zero_grad()
    counted = batch["attention_mask"].sum(1) ** power
    for part in (slice(0, 1), slice(1, 4)):
        loss = distiller({key: value[part] for key, value in batch.items()}).loss
        (loss * counted[part].sum() / counted.sum()).backward()
    torch.testing.assert_close(gradients(distiller), whole, rtol=1e-4, atol=1e-6)


def test_parameter_groups_hold_every_trainable_parameter_once():
    teacher, student = models(hidden=16)
    student.embeddings.word_embeddings.weight.requires_grad_(False)
    distiller = Distiller(teacher, student, BOTH)
    groups = distiller.parameter_groups(lr=1e-3, weight_decay=0.1, projection_lr=1e-2)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in distiller.parameters() if p.requires_grad)
    setting = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    layer = student.encoder.layer[0].output
    projection = distiller.objective.terms["hid_seq"].projections[0]
    assert setting[id(layer.dense.weight)] == (1e-3, 0.1)
    assert setting[id(layer.dense.bias)] == (1e-3, 0.0)
    assert setting[id(layer.LayerNorm.weight)] == (1e-3, 0.0)
    assert setting[id(projection.weight)] == (1e-2, 0.1)
    assert setting[id(projection.bias)] == (1e-2, 0.0)
    torch.optim.AdamW(groups)


def random_maps(distiller, batch, steps):
    maps = []
    for _ in range(steps):
        distiller(batch)
        pairs = [term.pairs for term in distiller.objective.terms.values()]
        assert pairs[1] == tuple((s + 1, t + 1) for s, t in pairs[0])
        maps.append(pairs[0])
    return maps


def test_random_maps_are_redrawn_shared_by_terms_and_resume_exactly():
    teacher = tiny_model("bert", layers=8)
    student = tiny_model("bert", layers=3, seed=1)
    batch = tiny_batch(teacher)

    def build(seed=3):
        return Distiller(teacher, student, BOTH, layer_map="random", seed=seed).train()

    whole = random_maps(build(), batch, 8)
    assert len(set(whole)) > 3
    first = build()
    assert random_maps(first, batch, 5) == whole[:5]
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    resumed = build(seed=4)
    resumed.load_state_dict(state)
    assert random_maps(resumed, batch, 3) == whole[5:]


def test_random_maps_hold_still_in_eval_mode():
    teacher = tiny_model("bert", layers=8)
    distiller = Distiller(teacher, tiny_model("bert", layers=3), BOTH, layer_map="random").train()
    batch = tiny_batch(teacher)
    following = random_maps(copy.deepcopy(distiller), batch, 3)
    assert len(set(random_maps(distiller.eval(), batch, 3))) == 1
    assert random_maps(distiller.train(), batch, 3) == following


def test_state_dict_restores_projections_and_banks():
    teacher, student = models(hidden=16)
    objective = "hid_seq + hid_cls_contrast"
    one = Distiller(teacher, student, objective, num_examples=6, seed=0).train()
    batch = {**tiny_batch(teacher), "index": torch.tensor([1, 4, 5])}
    one(batch)
    other = Distiller(teacher, copy.deepcopy(student), objective, num_examples=6, seed=1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(batch).loss, other.eval()(batch).loss)


@pytest.mark.parametrize(
    ("poison", "place"),
    [
        (lambda t: t.bert.encoder.layer[3].attention.self.query, "teacher block 3 query"),
        (lambda t: t.bert.encoder.layer[1].output.dense, "teacher state 2"),
        (lambda t: t.bert.embeddings.LayerNorm, "teacher state 0"),
        (lambda t: t.classifier, "teacher logits"),
    ],
)
def test_nan_from_the_teacher_names_its_first_place(poison, place):
    teacher, student = models("sequence")
    poison(teacher).weight.data[0] = torch.nan
    distiller = Distiller(teacher, student, "att_kl + hid_seq(map='skip') + kd")
    batch = tiny_batch(teacher, labels=True)
    with pytest.raises(NonFiniteError, match=f"{place} holds NaN"):
        distiller(batch)
    distiller.finite_checks = False
    output = distiller(batch)
    with pytest.raises(NonFiniteError, match=f"{place} holds NaN"):
        distiller.check_finite(output, batch)


def test_nan_in_the_student_or_in_labels_is_told_apart():
    teacher, student = models("sequence", num_labels=1)
    batch = {**tiny_batch(teacher), "labels": torch.tensor([0.0, torch.inf, 0.0])}
    with pytest.raises(NonFiniteError, match=r"terms: ce\).*teacher's tensors are finite"):
        Distiller(teacher, student, "att_kl + ce")(batch)
    student.bert.encoder.layer[1].attention.self.key.weight.data[0] = torch.inf
    with pytest.raises(NonFiniteError, match="student block 1 key holds NaN"):
        Distiller(teacher, student, "att_kl")(batch)


def test_a_finite_loss_passes_the_check():
    teacher, student = models()
    distiller = Distiller(teacher, student, BOTH)
    batch = tiny_batch(teacher)
    distiller.check_finite(distiller(batch), batch)


def test_a_compiled_student_gives_the_same_loss_and_gradients():
    teacher, student = models("sequence")
    batch = tiny_batch(teacher, labels=True)
    Distiller(teacher, student, f"{BOTH} + kd")(batch).loss.backward()
    expected = gradients(student)
    student.zero_grad()
    distiller = Distiller(teacher, torch.compile(student, backend="eager"), f"{BOTH} + kd")
    distiller(batch).loss.backward()
    torch.testing.assert_close(gradients(student), expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    teacher = tiny_model("bert", layers=4)
    student = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, seed=1)
    distiller = Distiller(teacher, student, BOTH).train()
    batch = tiny_batch(teacher)
    distiller(batch).loss.backward()
    expected = gradients(student)
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller(batch).loss.backward()
    torch.testing.assert_close(gradients(student), expected, rtol=1e-4, atol=1e-6)


def test_a_loss_that_trains_nothing_says_what_is_frozen():
    teacher = tiny_model("bert", layers=4, head_cls="sequence")
    student = tiny_model("bert", head_cls="sequence", seed=1)
    batch = tiny_batch(teacher)
    distiller = Distiller(teacher, student, "att_kl").train()
    student.bert.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"no term reads what is trained .*\(classifier\.weight, classifier\.bias\)",
    ):
        distiller(batch)
    with torch.no_grad():
        want = distiller(batch).loss
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient: the student is frozen"):
        distiller(batch)
    assert distiller.eval()(batch).loss.isfinite()
    assert want.isfinite()
    # The logits come from the head, which is trained.
    student.classifier.requires_grad_(True)
    Distiller(teacher, student, "kd + att_kl").train()(batch).loss.backward()


def test_windows_that_differ_are_warned_about_once():
    teacher = tiny_model("modernbert", layers=4, local_attention=4)
    distiller = Distiller(teacher, tiny_model("modernbert", layers=2, local_attention=4), "att_kl")
    with pytest.warns(
        UserWarning, match="attends to all tokens and the other to 2 tokens to either side"
    ):
        distiller(tiny_batch(teacher))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(tiny_batch(teacher))


def test_a_copy_made_by_data_parallel_is_refused():
    distiller = Distiller(*models(), BOTH)
    with pytest.raises(ValueError, match=r"nn.DataParallel.*DistributedDataParallel"):
        distiller._replicate_for_data_parallel()(tiny_batch(distiller.teacher))
