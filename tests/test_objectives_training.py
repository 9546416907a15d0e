"""Weights, presets, and every objective at work: losses fall, gradients go where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_model, tiny_pair

from bertkd.distiller import Distiller
from bertkd.objectives import PRESETS, TERMS, read_objective


def run(objective, teacher, student, batch):
    return Distiller(teacher, student, objective)(batch).loss.detach()


def test_weights_multiply_and_terms_are_reported_unweighted():
    teacher, student = tiny_pair()
    batch = tiny_batch(teacher)
    output = Distiller(teacher, student, "0.5*att_kl + 3*hid_seq + att_kl(map='last')")(batch)
    alone = {text: run(text, teacher, student, batch) for text in ("att_kl", "hid_seq")}
    last = run("att_kl(map='last')", teacher, student, batch)
    torch.testing.assert_close(output.terms["att_kl"], alone["att_kl"])
    torch.testing.assert_close(output.terms["att_kl_2"], last)
    torch.testing.assert_close(
        output.loss.detach(), 0.5 * alone["att_kl"] + 3 * alone["hid_seq"] + last
    )


def trained(objective, steps=6, **options):
    head_cls = "sequence"
    teacher = tiny_model("bert", layers=4, head_cls=head_cls)
    student = tiny_model(
        "bert",
        layers=2,
        head_cls=head_cls,
        seed=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    batch = {**tiny_batch(teacher, batch=4, labels=True), "index": torch.arange(4)}
    distiller = Distiller(teacher, student, objective, num_examples=8)
    distiller.train()
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=5e-3))
    losses = []
    for _ in range(steps):
        loss = distiller(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher's {name} changed"
    assert all(p.grad is None for p in teacher.parameters())
    idle = [n for n, p in distiller.objective.named_parameters() if p.grad is None]
    assert not idle, f"projections without gradient: {idle}"
    return losses, distiller


EVERY = [
    *TERMS,
    "hid_cls_contrast(mode='batch')",
    "hid_cls_contrast(mode='queue', queue_size=16)",
    "hid_cls_contrast(map='last', mode='batch')",
    "hid_seq(map='combine')",
    "hid_seq(map='combine')@released",
    "att_pearson@released",
    *(name for name in PRESETS if name not in TERMS),
]


@pytest.mark.parametrize("objective", EVERY)
def test_every_objective_trains(objective):
    losses, _ = trained(objective)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "objective",
    [
        "hid_seq",
        "hid_cls",
        "hid_cos(map='last')",
        "pkd",
        "alp",
        "pool",
        "hid_seq(project=True)",
        "hid_cls(map='combine')",
        "att_kl(relation_heads=2)",
        "hid_cls_contrast(mode='batch')",
        "minilmv2",
        "tinybert",
        "hid_seq(map='random')",
    ],
)
def test_narrower_students_train_with_projections_that_get_gradients(objective):
    losses, distiller = trained(objective, steps=3, hidden=16, heads=4)
    assert losses[-1] < losses[0] or "random" in objective
    assert distiller.objective.expression.terms


ZERO = [
    "kd",
    "att_kl",
    "att_mse",
    "val_kl",
    "qkv_kl",
    "hid_seq",
    "hid_seq(map='skip')",
    "hid_cls",
    "hid_cos",
    "pkd",
    "pool",
    "att_pearson",
    "kd(temperature=4)",
    "att_kl@released",
    "att_mse@released",
    "val_kl@released",
    "hid_seq@released",
]


@pytest.mark.parametrize("objective", ZERO)
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(objective):
    teacher = tiny_model("bert", layers=2, head_cls="sequence")
    student = copy.deepcopy(teacher)
    loss = Distiller(teacher, student, objective)(tiny_batch(teacher)).loss
    loss.backward()
    assert abs(loss.item()) < 2e-6
    largest = max(p.grad.abs().max() for p in student.parameters() if p.grad is not None)
    assert largest < 2e-5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_back_and_name_their_sources(name):
    preset = PRESETS[name]
    assert preset.source
    assert preset.initialisation
    assert read_objective(preset.objective).terms
    if preset.released:
        assert all(t.released or t.kind == "ce" for t in read_objective(f"{name}@released").terms)


def test_distilbert_distils_all_tokens_and_learns_the_masked_ones():
    teacher = tiny_model("bert", layers=4, head_cls="mlm")
    student = tiny_model("bert", seed=1, head_cls="mlm")
    batch = tiny_batch(teacher, length=8)
    real = batch["attention_mask"].bool()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 2] = 7
    with torch.no_grad():
        ours, theirs = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    log_p, p = (F.log_softmax(ours.logits / 2, -1), F.softmax(theirs.logits / 2, -1))
    expected = 5 * 4 * F.kl_div(log_p[real], p[real], reduction="batchmean")
    expected += 2 * F.cross_entropy(ours.logits[:, 2], labels[:, 2])
    cosines = F.cosine_similarity(ours.hidden_states[-1], theirs.hidden_states[-1], dim=-1)
    expected += (1 - cosines[real]).mean()
    loss = Distiller(teacher, student, "distilbert").eval()({**batch, "labels": labels}).loss
    torch.testing.assert_close(loss.detach(), expected)


def test_patient_kd_weighs_a_mean_over_channels():
    weights = {term.kind: term.weight for term in read_objective("patient_kd").terms}
    states = [F.normalize(torch.randn(4, 5, 768), dim=-1) for _ in range(2)]
    loss = weights["pkd"] * (states[0] - states[1]).square().sum(-1).mean()
    torch.testing.assert_close(loss, 100 * F.mse_loss(*states), rtol=0.01, atol=0)


def test_a_preset_in_a_sum_takes_the_weight_before_it():
    expression = read_objective("kd + 0.5*distilbert")
    assert [(t.name, t.weight) for t in expression.terms] == [
        ("kd", 1.0),
        ("kd_2", 2.5),
        ("ce", 1.0),
        ("hid_cos", 0.5),
    ]


def test_building_does_not_depend_on_the_default_device():
    teacher, student = tiny_pair(hidden=16)
    objective = "hid_seq + att_kl(map='random') + hid_cls_contrast(mode='queue')"
    batch = tiny_batch(teacher)
    losses = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            distiller = Distiller(teacher, student, objective)
            distiller.objective.redraw()
        losses.append(distiller(batch).loss)
    assert torch.equal(*losses)


def test_building_is_deterministic_and_leaves_the_global_generators_alone(monkeypatch):
    teacher, student = tiny_pair(hidden=16)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs reseeded"))
    state = torch.get_rng_state()
    weights = [
        Distiller(teacher, student, "hid_seq", seed=seed)
        .objective.terms["hid_seq"]
        .projections[0]
        .weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("head", ["sequence", "mlm"])
def test_logits_of_models_that_return_tuples(head):
    teacher = tiny_model("bert", layers=4, head_cls=head)
    student = tiny_model("bert", seed=1, head_cls=head)
    batch = tiny_batch(teacher)
    want = Distiller(teacher, student, "att_kl + kd")(batch)
    for model in (teacher, student):
        model.config.return_dict = False
        model.config.output_hidden_states = True
    got = Distiller(teacher, student, "att_kl + kd")(batch)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
