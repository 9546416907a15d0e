"""Every term's default form against a plain computation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_model

from bertkd import Capture
from bertkd.distiller import Distiller
from bertkd.objectives.terms_sentence import pkd_pairs

PAIRS = [(0, 1), (1, 3)]
STATES = [(1, 2), (2, 4)]


def models(head_cls=None, **student):
    teacher = tiny_model("bert", layers=4, head_cls=head_cls)
    sizes = {"layers": 2, "seed": 1, "head_cls": head_cls, **student}
    return teacher, tiny_model("bert", **sizes)


def run(objective, teacher, student, batch, **options):
    return Distiller(teacher, student, objective, **options)(batch).loss.detach()


def insides(model, batch):
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return eager(**inputs, output_hidden_states=True, output_attentions=True)


def qkv(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return Capture(model, blocks=range(model.config.num_hidden_layers))(**inputs)


def close(got, expected, rtol=1e-4):
    torch.testing.assert_close(got, expected.float(), rtol=rtol, atol=1e-6)


def masked_rows_kl(p_t, p_s, mask):
    """Mean over real rows and heads of sum_j p_t log(p_t / p_s), 0 log 0 = 0."""
    rows = (torch.xlogy(p_t, p_t) - torch.xlogy(p_t, p_s)).nan_to_num(0.0).sum(-1)
    return (rows * mask[:, None]).sum() / (mask.sum() * p_t.shape[1])


@pytest.fixture(scope="module", params=["right", "left", "ragged", None])
def case(request):
    teacher, student = models()
    batch = tiny_batch(teacher, batch=3, length=9, padding=request.param)
    return teacher, student, batch, batch.get("attention_mask", torch.ones(3, 9, dtype=torch.long))


def test_att_kl_is_the_kl_of_hugging_faces_maps_over_real_rows(case):
    teacher, student, batch, mask = case
    maps_t, maps_s = insides(teacher, batch).attentions, insides(student, batch).attentions
    expected = sum(masked_rows_kl(maps_t[t].double(), maps_s[s].double(), mask) for s, t in PAIRS)
    close(run("att_kl", teacher, student, batch), expected)
    close(run("att_kl(reduction='mean')", teacher, student, batch), expected / 2)


def test_att_kl_temperature(case):
    teacher, student, batch, mask = case
    keys = mask[:, None, None, :] == 0
    ours, theirs = qkv(student, batch), qkv(teacher, batch)

    def sharpened(side, i):
        scores = side.q[i] @ side.k[i].mT * 8**-0.5 / 3
        return torch.softmax(scores.masked_fill(keys, -torch.inf), -1).nan_to_num(0.0)

    expected = sum(masked_rows_kl(sharpened(theirs, t), sharpened(ours, s), mask) for s, t in PAIRS)
    close(run("att_kl(temperature=3, t_squared=True)", teacher, student, batch), 9 * expected)
    close(run("att_kl(temperature=3)", teacher, student, batch), expected)


def test_att_mse_is_over_real_rows_and_keys(case):
    teacher, student, batch, mask = case
    ours, theirs = qkv(student, batch), qkv(teacher, batch)
    real = (mask[:, None, :, None] * mask[:, None, None, :]).expand(3, 4, 9, 9) == 1
    expected = 0.0
    for s, t in PAIRS:
        difference = ours.q[s] @ ours.k[s].mT * 8**-0.5 - theirs.q[t] @ theirs.k[t].mT * 8**-0.5
        expected = expected + difference[real].square().mean()
    close(run("att_mse", teacher, student, batch), expected, rtol=1e-3)
    close(run("att_mse(reduction='mean')", teacher, student, batch), expected / 2, rtol=1e-3)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_qkv_kl_splits_joined_heads_anew(case, heads):
    teacher, student, batch, mask = case
    ours, theirs = qkv(student, batch), qkv(teacher, batch)
    keys = mask[:, None, None, :] == 0

    def relation(x):
        joined = x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
        scores = joined @ joined.mT * joined.shape[-1] ** -0.5
        return torch.softmax(scores.masked_fill(keys, -torch.inf), -1).nan_to_num(0.0)

    expected = sum(
        masked_rows_kl(relation(getattr(theirs, x)[3]), relation(getattr(ours, x)[1]), mask)
        for x in "qkv"
    )
    close(run(f"qkv_kl(relation_heads={heads})", teacher, student, batch), expected)


def test_qkv_kl_blocks_can_be_chosen_and_heads_may_differ():
    teacher, student = models(heads=2, hidden=16)
    batch = tiny_batch(teacher, padding=None)
    distiller = Distiller(teacher, student, "qkv_kl(student_block=0, teacher_block=2)")
    term = distiller.objective.terms["qkv_kl"]
    assert term.pairs == ((0, 2),)
    assert term.relation_heads == 2
    assert distiller(batch).loss > 0


@pytest.mark.parametrize(
    ("widths", "heads"), [((384, 768), 48), ((384, 1024), 64), ((768, 1024), 64), ((256, 1024), 32)]
)
def test_default_relation_heads_are_the_sources(widths, heads):
    from bertkd.encoders import EncoderSpec
    from bertkd.objectives.attention_base import default_relation_heads
    from bertkd.objectives.base import Side

    sides = [Side("x", EncoderSpec("bert", 12, w // 32, 32, w, 99, 512)) for w in widths]
    assert default_relation_heads(*sides) == heads


def test_val_kl_masks_pad_keys_and_rows(case):
    teacher, student, batch, mask = case
    ours, theirs = qkv(student, batch), qkv(teacher, batch)
    keys = mask[:, None, None, :] == 0

    def relation(x):
        scores = (x @ x.mT * 8**-0.5).masked_fill(keys, -torch.inf)
        return torch.softmax(scores, -1).nan_to_num(0.0)

    expected = sum(
        masked_rows_kl(relation(theirs.v[t]), relation(ours.v[s]), mask) for s, t in PAIRS
    )
    close(run("val_kl", teacher, student, batch), expected)


def test_hid_seq_averages_real_tokens(case):
    teacher, student, batch, mask = case
    ours, theirs = insides(student, batch).hidden_states, insides(teacher, batch).hidden_states
    real = mask == 1
    expected = sum(F.mse_loss(ours[s][real], theirs[t][real]) for s, t in STATES)
    close(run("hid_seq", teacher, student, batch), expected)
    close(run("hid_seq(reduction='mean')", teacher, student, batch), expected / 2)
    skip = expected + F.mse_loss(ours[0][real], theirs[0][real])
    close(run("hid_seq(map='skip')", teacher, student, batch), skip)


@pytest.mark.parametrize(("shared", "count"), [(False, 2), (True, 1)])
def test_hid_seq_projects_the_student_where_widths_differ(case, shared, count):
    teacher, _, batch, mask = case
    student = tiny_model("bert", layers=2, hidden=16, seed=1)
    distiller = Distiller(teacher, student, f"hid_seq(shared={shared})")
    layers = distiller.objective.terms["hid_seq"].projections
    assert len(layers) == count
    ours, theirs = insides(student, batch).hidden_states, insides(teacher, batch).hidden_states
    real = mask == 1
    expected = sum(
        F.mse_loss(layers[0 if shared else i](ours[s][real]), theirs[t][real])
        for i, (s, t) in enumerate(STATES)
    )
    close(distiller(batch).loss.detach(), expected.detach())


def test_hid_seq_combine_projects_the_student_by_default(case):
    teacher, student, batch, mask = case
    distiller = Distiller(teacher, student, "hid_seq", layer_map="combine")
    layer = distiller.objective.terms["hid_seq"].projections[0]
    ours, theirs = insides(student, batch).hidden_states, insides(teacher, batch).hidden_states
    real = mask == 1
    expected = F.mse_loss(layer(torch.cat(ours, -1)[real]), torch.cat(theirs, -1)[real])
    close(distiller(batch).loss.detach(), expected.detach())


def first_tokens(states, mask):
    return [h[torch.arange(3), mask.argmax(1)] for h in states]


def test_hid_cls_takes_the_first_real_token(case):
    teacher, student, batch, mask = case
    ours = first_tokens(insides(student, batch).hidden_states, mask)
    theirs = first_tokens(insides(teacher, batch).hidden_states, mask)
    expected = sum(F.mse_loss(ours[s], theirs[t]) for s, t in STATES)
    close(run("hid_cls", teacher, student, batch), expected)


def test_hid_cos(case):
    teacher, student, batch, mask = case
    ours, theirs = insides(student, batch).hidden_states, insides(teacher, batch).hidden_states
    real = mask == 1
    expected = (1 - F.cosine_similarity(ours[2][real], theirs[4][real], dim=-1)).mean()
    close(run("hid_cos(map='last')", teacher, student, batch), expected)


def test_pkd_leaves_out_the_last_block(case):
    teacher, student, batch, mask = case
    ours = first_tokens(insides(student, batch).hidden_states, mask)
    theirs = first_tokens(insides(teacher, batch).hidden_states, mask)
    difference = F.normalize(ours[1], dim=-1) - F.normalize(theirs[2], dim=-1)
    close(run("pkd", teacher, student, batch), difference.square().sum(-1).mean())


def test_pkd_maps_are_the_sources():
    assert [t for _, t in pkd_pairs("skip", 6, 12)] == [2, 4, 6, 8, 10]
    assert [t for _, t in pkd_pairs("last", 6, 12)] == [7, 8, 9, 10, 11]
    assert [s for s, _ in pkd_pairs("last", 6, 12)] == [1, 2, 3, 4, 5]


def test_alp_leaves_out_the_embedding(case):
    teacher, student, batch, mask = case
    ours = torch.stack(first_tokens(insides(student, batch).hidden_states, mask)[1:], 1)
    theirs = torch.stack(first_tokens(insides(teacher, batch).hidden_states, mask)[1:], 1)
    mixed = torch.softmax(ours @ theirs.mT, -1) @ theirs
    close(run("alp", teacher, student, batch), F.mse_loss(ours, mixed))


def test_alp_can_keep_gradients_out_of_its_weights():
    teacher, student = models()
    batch = tiny_batch(teacher)
    results = []
    for detach in (False, True):
        student.zero_grad()
        loss = Distiller(teacher, student, f"alp(detach={detach})")(batch).loss
        loss.backward()
        results.append((loss.item(), student.encoder.layer[0].output.dense.weight.grad.clone()))
    assert results[0][0] == results[1][0]
    assert not torch.allclose(results[0][1], results[1][1])


def test_pool_is_one_minus_cosine_of_mean_pooled_last_states(case):
    teacher, student, batch, mask = case

    def pooled(model):
        hidden = insides(model, batch).last_hidden_state
        return torch.stack([h[m == 1].mean(0) for h, m in zip(hidden, mask, strict=True)])

    ours, theirs = pooled(student), pooled(teacher)
    close(run("pool", teacher, student, batch), (1 - F.cosine_similarity(ours, theirs)).mean())
    close(run("pool(metric='mse')", teacher, student, batch), F.mse_loss(ours, theirs))


def test_att_pearson_correlates_real_keys_of_real_rows(case):
    teacher, student, batch, mask = case
    maps_t, maps_s = insides(teacher, batch).attentions, insides(student, batch).attentions
    expected = 0.0
    for s, t in PAIRS:
        rows = []
        for b, h, i in torch.ones(3, 4, 9).nonzero().tolist():
            keys = mask[b] == 1
            if mask[b, i] == 1 and keys.sum() > 1:
                xy = torch.stack([maps_s[s][b, h, i][keys], maps_t[t][b, h, i][keys]])
                rows.append(1 - torch.corrcoef(xy.double())[0, 1])
        expected = expected + torch.stack(rows).mean()
    close(run("att_pearson", teacher, student, batch), expected)


def test_att_pearson_leaves_out_rows_with_a_single_key():
    teacher, student = models()
    batch = tiny_batch(teacher, batch=2, length=6)
    alone = {key: value[:1] for key, value in batch.items()}
    batch["attention_mask"][1] = torch.tensor([1, 0, 0, 0, 0, 0])
    close(run("att_pearson", teacher, student, batch), run("att_pearson", teacher, student, alone))


def test_att_pearson_in_chunks_keeps_value_and_gradient(monkeypatch):
    from bertkd.objectives import terms_pearson

    teacher, student = models()
    batch = tiny_batch(teacher, length=13)
    results = []
    for rows in (64, 5):
        monkeypatch.setattr(terms_pearson, "ROWS", rows)
        student.zero_grad()
        loss = Distiller(teacher, student, "att_pearson")(batch).loss
        loss.backward()
        results.append((loss.detach(), student.encoder.layer[0].attention.self.query.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_kd_and_ce_on_a_sequence_head():
    teacher, student = models("sequence")
    batch = tiny_batch(teacher, labels=True)
    z_s, z_t = insides(student, batch).logits, insides(teacher, batch).logits
    kl = F.kl_div(torch.log_softmax(z_s / 3, -1), torch.softmax(z_t / 3, -1), reduction="batchmean")
    close(run("kd(temperature=3)", teacher, student, batch), 9 * kl)
    close(run("kd(temperature=3, t_squared=False)", teacher, student, batch), kl)
    close(run("ce", teacher, student, batch), F.cross_entropy(z_s, batch["labels"]))


def test_kd_and_ce_on_a_regression_head():
    teacher, student = models("sequence", num_labels=1)
    teacher = tiny_model("bert", layers=4, head_cls="sequence", num_labels=1)
    batch = {**tiny_batch(teacher), "labels": torch.tensor([0.5, -1.0, 2.0])}
    z_s, z_t = insides(student, batch).logits, insides(teacher, batch).logits
    close(run("kd", teacher, student, batch), F.mse_loss(z_s, z_t))
    close(run("ce", teacher, student, batch), F.mse_loss(z_s[:, 0], batch["labels"]))
    with pytest.warns(UserWarning, match=r"kd: temperature=2\.0 does nothing for regression"):
        close(run("kd(temperature=2)", teacher, student, batch), F.mse_loss(z_s, z_t))


def test_ce_on_a_multi_label_head():
    teacher, student = models("sequence", problem_type="multi_label_classification")
    batch = {**tiny_batch(teacher), "labels": torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])}
    z_s = insides(student, batch).logits
    expected = F.binary_cross_entropy_with_logits(z_s, batch["labels"].float())
    close(run("ce", teacher, student, batch), expected)


def test_kd_and_ce_on_a_masked_language_model_count_labelled_tokens():
    teacher, student = models("mlm")
    batch = tiny_batch(teacher, length=8)
    z_s, z_t = insides(student, batch).logits, insides(teacher, batch).logits

    def kl(rows):
        return F.kl_div(
            torch.log_softmax(z_s[rows], -1), torch.softmax(z_t[rows], -1), reduction="batchmean"
        )

    close(run("kd", teacher, student, batch), kl(batch["attention_mask"] == 1))
    labels = torch.full((3, 8), -100)
    labels[0, 2], labels[1, 1], labels[2, 0] = 7, 9, 11
    batch["labels"] = labels
    close(run("kd", teacher, student, batch), kl(labels != -100))
    close(run("kd(all_tokens=True)", teacher, student, batch), kl(batch["attention_mask"] == 1))
    close(run("ce", teacher, student, batch), F.cross_entropy(z_s.flatten(0, 1), labels.flatten()))
    batch["labels"] = torch.full((3, 8), -100)
    assert run("ce", teacher, student, batch) == 0


@pytest.mark.parametrize("objective", ["att_kl", "hid_seq", "hid_cls", "hid_cos"])
def test_a_layer_map_may_be_an_array(objective):
    teacher, student = models()
    pairs = np.array([[0, 1], [1, 3]])
    batch = tiny_batch(teacher)
    got = run(objective, teacher, student, batch, layer_map=pairs)
    assert torch.equal(got, run(objective, teacher, student, batch, layer_map="0:1,1:3"))


@pytest.mark.parametrize(
    "objective", ["alp", "pkd", "hid_cls", "pool", "hid_cls_contrast(mode='queue')"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_terms_with_projections_may_be_moved_to_another_dtype(objective, dtype):
    teacher = tiny_model("bert", layers=4)
    student = tiny_model("bert", seed=1, hidden=16)
    distiller, batch = Distiller(teacher, student, objective).eval(), tiny_batch(teacher)
    want = distiller(batch).loss
    loss = distiller.to(dtype)(batch).loss
    loss.backward()
    rounding = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(loss.float(), want, rtol=rounding, atol=rounding)
    assert all(p.grad is not None for p in distiller.objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("mask", [lambda m: m.bool(), lambda m: m * torch.arange(1, 13)])
def test_the_first_token_is_the_first_that_the_mask_does_not_cover(mask):
    teacher = tiny_model("bert", layers=4)
    distiller = Distiller(teacher, tiny_model("bert", seed=1), "hid_cls").eval()
    batch = tiny_batch(teacher)
    other = {**batch, "attention_mask": mask(batch["attention_mask"].flip(1))}
    want = distiller({**batch, "attention_mask": batch["attention_mask"].flip(1)}).loss
    torch.testing.assert_close(distiller(other).loss, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_type(dtype):
    teacher = tiny_model("bert", head_cls="sequence")
    distiller = Distiller(teacher, tiny_model("bert", seed=1, head_cls="sequence"), "ce").eval()
    batch = tiny_batch(teacher, labels=True)
    want = distiller(batch).loss
    assert torch.equal(distiller({**batch, "labels": batch["labels"].to(dtype)}).loss, want)
    with pytest.raises(ValueError, match=r"labels must be 0\.\.\d+, or -100 where ignored, got 77"):
        distiller({**batch, "labels": torch.full_like(batch["labels"], 77)})


def test_regression_to_several_numbers():
    options = {"head_cls": "sequence", "num_labels": 2, "problem_type": "regression"}
    teacher, student = tiny_model("bert", **options), tiny_model("bert", seed=1, **options)
    distiller = Distiller(teacher, student, "ce").eval()
    batch = {**tiny_batch(teacher), "labels": torch.randn(3, 2)}
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    want = torch.nn.functional.mse_loss(student.eval()(**inputs).logits, batch["labels"])
    torch.testing.assert_close(distiller(batch).loss, want)
