"""What docs/migrating.md says of other toolkits' numbers, against their formulas written out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_models import tiny_batch, tiny_model
from transformers import AutoModel

import bertkd
from bertkd import Capture, Distiller
from bertkd.objectives.build import read_objective
from bertkd.training.recipe import Recipe

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
LABELS = torch.tensor([0, 2, 1])


def models(head_cls="sequence", **student):
    teacher = tiny_model("bert", layers=4, head_cls=head_cls)
    return teacher, tiny_model("bert", layers=2, seed=1, head_cls=head_cls, **student)


@pytest.fixture(scope="module")
def case():
    teacher, student = models()
    batch = tiny_batch(teacher)
    ours = student(**batch, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    return teacher, student, batch, ours, theirs


def value(case, objective, **labels):
    teacher, student, batch, *_ = case
    return Distiller(teacher, student, objective)({**batch, **labels}).loss


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_objectives_and_recipe_of_the_page_can_be_read():
    names = r"(?:kd(?!_)|ce|hid_\w+|att_\w+|pkd|qkv_kl|pool|minilm\w*|tinybert|distilbert)"
    objectives = re.findall(rf"`((?:[\d.]+\*)?{names}[^`]*)`", PAGE.replace("\n", " "))
    assert len(objectives) > 15
    for objective in objectives:
        read_objective(objective)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert len(Recipe.from_dict(yaml.safe_load(recipe)).stages) == 2


def test_a_random_student_has_its_teachers_sizes_and_not_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = tiny_model("bert", layers=4, hidden=16)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    block = block.replace("first:6", "first:2").replace("384", "8")
    exec(block, {"bertkd": bertkd, "AutoModel": AutoModel, "teacher": teacher})
    student = AutoModel.from_pretrained("runs/random")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 8)
    copied = bertkd.create_student(teacher, "first:2", hidden_size=8).get_input_embeddings()
    assert not torch.equal(student.get_input_embeddings().weight, copied.weight)


def test_textbrewer(case):
    *_, batch, ours, theirs = case
    mask = batch["attention_mask"].unsqueeze(-1).float()
    h_s, h_t = ours.hidden_states[2], theirs.hidden_states[4]
    mse = (F.mse_loss(h_s, h_t, reduction="none") * mask).sum() / (mask.sum() * h_s.shape[-1])
    close(value(case, "hid_seq(map='2:4')"), mse)
    cos = 1 - (F.cosine_similarity(h_s, h_t, dim=-1) * mask[..., 0]).sum() / mask.sum()
    close(value(case, "hid_cos(map='2:4')"), cos)
    pkd = (F.normalize(h_s[:, 0], dim=-1) - F.normalize(h_t[:, 0], dim=-1)).square().sum(-1).mean()
    close(value(case, "pkd(map='2:4')"), pkd)

    z_s = ours.logits.detach().requires_grad_()
    p_t = (theirs.logits / 8).softmax(-1).detach()
    cross_entropy = -(p_t * (z_s / 8).log_softmax(-1)).sum(-1).mean()
    entropy = -(p_t * p_t.log()).sum(-1).mean()
    kd = value(case, "kd(temperature=8, t_squared=False)")
    close(kd, cross_entropy - entropy)
    close(value(case, "kd(temperature=8)"), 64 * kd)
    close(value(case, "0.5*ce", labels=LABELS), 0.5 * F.cross_entropy(z_s, LABELS))


def test_weights_and_temperatures_may_change_between_steps(case):
    teacher, student, batch, *_ = case
    distiller = Distiller(teacher, student, "kd(t_squared=False)")
    distiller.objective.terms["kd"].weight = 0.25
    distiller.objective.terms["kd"].temperature = 8
    close(distiller(batch).loss, 0.25 * value(case, "kd(temperature=8, t_squared=False)"))


def test_distilbert():
    teacher, student = models("mlm")
    batch = tiny_batch(teacher)
    real = batch["attention_mask"].bool()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = batch["input_ids"][:, 1]
    ours = student(**batch, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    z_s, z_t = ours.logits[real], theirs.logits[real]
    kd = F.kl_div((z_s / 2).log_softmax(-1), (z_t / 2).softmax(-1), reduction="batchmean") * 4
    mlm = F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    h_s, h_t = ours.hidden_states[-1][real], theirs.hidden_states[-1][real]
    cos = F.cosine_embedding_loss(h_s, h_t, torch.ones(len(h_s)))
    distiller = Distiller(teacher, student, "distilbert")
    close(distiller({**batch, "labels": labels}).loss, 5 * kd + 2 * mlm + cos)


def test_tinybert_counts_padding():
    teacher, student = models(hidden=16)
    batch = tiny_batch(teacher)
    pads = batch["attention_mask"][:, None, None, :] == 0
    objective = "att_mse@released + hid_seq(map='skip', shared=True, count_pads=True)"
    distiller = Distiller(teacher, student, objective)
    ours = Capture(student, blocks=range(2), states=range(3))(**batch)
    theirs = Capture(teacher, blocks=range(4), states=range(5))(**batch)

    def scores(side, block):
        each = side.q[block] @ side.k[block].mT * side.q[block].shape[-1] ** -0.5
        return each.masked_fill(pads, 0.0)

    attention = sum(F.mse_loss(scores(ours, i), scores(theirs, 2 * i + 1)) for i in range(2))
    fit_dense = distiller.objective.terms["hid_seq"].projections[0]
    states = sum(F.mse_loss(fit_dense(ours.states[i]), theirs.states[2 * i]) for i in range(3))
    close(distiller(batch).loss, attention + states)


def test_sentence_transformers(case):
    *_, batch, ours, theirs = case
    mask = batch["attention_mask"].unsqueeze(-1)
    e_s, e_t = ((side.hidden_states[-1] * mask).sum(1) / mask.sum(1) for side in (ours, theirs))
    close(value(case, "pool(metric='mse')"), F.mse_loss(e_s, e_t))
    normalised = F.mse_loss(F.normalize(e_s, dim=-1), F.normalize(e_t, dim=-1))
    close(value(case, "pool") * 2 / e_s.shape[-1], normalised)


def test_a_cross_encoders_scores_are_compared_as_numbers():
    config = {"layers": 2, "head_cls": "sequence", "num_labels": 1}
    teacher, student = tiny_model("bert", **config), tiny_model("bert", seed=1, **config)
    batch = tiny_batch(teacher)
    expected = F.mse_loss(student(**batch).logits, teacher(**batch).logits)
    close(Distiller(teacher, student, "kd")(batch).loss, expected)


def test_the_paper_divides_what_stands_beside_the_logits_by_the_batch_once_more(case):
    *_, ours, theirs = case
    z_s, z_t, size = ours.logits, theirs.logits, len(LABELS)
    # As there: sums over the examples, a mean of the other loss, and all of it over the batch size.
    ce = F.cross_entropy(z_s, LABELS, reduction="sum")
    kd = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="sum")
    other = value(case, "att_kl@released")
    expected = (0.5 * ce + 0.5 * kd + other) / size
    objective = "0.5*ce + 0.5*kd + 0.03125*att_kl@released"
    assert f"`{objective}`" in PAGE
    close(value(case, objective.replace("0.03125", str(1 / size)), labels=LABELS), expected)
