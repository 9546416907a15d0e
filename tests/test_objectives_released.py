"""`@released` against plain reimplementations of the formulas that the paper's code computes.

The formulas below know nothing of bertkd: they take q, k, v and hidden states, build every map, and
follow the released code in counting pads, clamping and thresholding.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_model

from bertkd import Capture
from bertkd.distiller import Distiller

BLOCK_END = [(0, 1), (1, 3)]  # 4 -> 2 blocks
SKIP_STATES = [(0, 0), (1, 2), (2, 4)]


class Pair:
    """A 4-block teacher and a 2-block student on one right-padded batch, with all their insides."""

    def __init__(self, sharp: float = 1.0, hidden: int = 32):
        self.teacher = tiny_model("bert", layers=4, head_cls="sequence")
        self.student = tiny_model("bert", layers=2, hidden=hidden, head_cls="sequence", seed=1)
        for model in (self.teacher, self.student):
            for layer in model.bert.encoder.layer:
                layer.attention.self.query.weight.data *= sharp
        self.batch = tiny_batch(self.teacher, batch=3, length=9, labels=True)
        self.t, self.s = self._insides(self.teacher), self._insides(self.student)

    def _insides(self, model):
        inputs = {key: value for key, value in self.batch.items() if key != "labels"}
        with torch.no_grad():
            blocks = range(model.config.num_hidden_layers)
            recording = Capture(model, blocks=blocks)(**inputs)
            output = model(**inputs, output_hidden_states=True)
        return {
            "q": recording.q,
            "k": recording.k,
            "v": recording.v,
            "hidden": output.hidden_states,
            "logits": output.logits,
        }

    def score_map(self, side, block):
        """(B, H, L, L) with minus infinity at pad keys, as the task-specific code has it."""
        q, k = side["q"][block], side["k"][block]
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(self.batch["attention_mask"][:, None, None, :] == 0, -torch.inf)

    def loss(self, objective, **options):
        distiller = Distiller(self.teacher, self.student, objective, **options)
        return distiller(self.batch).loss, distiller


@pytest.fixture(scope="module")
def pair():
    return Pair()


@pytest.fixture(scope="module")
def sharp():
    """Attention so sharp that the clamp at 1e-7 and the threshold at -100 both bite."""
    return Pair(sharp=150.0)


def same(got, expected):
    torch.testing.assert_close(got.detach(), expected.float(), rtol=1e-4, atol=1e-6)


def naive_att_mse(pair):
    total = 0.0
    for s, t in BLOCK_END:
        a_s, a_t = pair.score_map(pair.s, s), pair.score_map(pair.t, t)
        a_s = torch.where(a_s <= -1e2, torch.zeros_like(a_s), a_s)
        a_t = torch.where(a_t <= -1e2, torch.zeros_like(a_t), a_t)
        total = total + F.mse_loss(a_s, a_t)
    return total


def naive_att_kl(pair, clamp=1e-7):
    total = 0.0
    for s, t in BLOCK_END:
        p_t = torch.softmax(pair.score_map(pair.t, t), -1)
        p_s = torch.softmax(pair.score_map(pair.s, s), -1).clamp(clamp, 1.0)
        batch, heads, length, _ = p_t.shape
        kl = F.kl_div(p_s.log(), p_t, reduction="sum")
        total = total + kl / (batch * heads * length)
    return total


def relation_kl(x_s, x_t, d_s, d_t):
    r_t = torch.softmax(x_t @ x_t.transpose(-1, -2) / d_t**0.5, -1)
    log_r_s = torch.log_softmax(x_s @ x_s.transpose(-1, -2) / d_s**0.5, -1)
    batch, heads, length, _ = r_t.shape
    return F.kl_div(log_r_s, r_t, reduction="sum") / (batch * heads * length)


@pytest.mark.parametrize("which", ["pair", "sharp"])
def test_att_mse(which, request):
    pair = request.getfixturevalue(which)
    same(pair.loss("att_mse@released")[0], naive_att_mse(pair))


def test_att_mse_threshold_matters_for_the_sharp_pair(sharp):
    scores = [sharp.score_map(sharp.t, t) for _, t in BLOCK_END]
    assert any(((a <= -1e2) & (a > -torch.inf)).any() for a in scores)


@pytest.mark.parametrize("which", ["pair", "sharp"])
def test_att_kl(which, request):
    pair = request.getfixturevalue(which)
    same(pair.loss("att_kl@released")[0], naive_att_kl(pair))


def test_att_kl_clamp_matters_for_the_sharp_pair(sharp):
    assert (naive_att_kl(sharp) - naive_att_kl(sharp, clamp=1e-30)).abs() > 1e-2


def test_val_kl_has_no_mask_and_the_students_scale(pair):
    expected = sum(relation_kl(pair.s["v"][s], pair.t["v"][t], 8, 8) for s, t in BLOCK_END)
    same(pair.loss("val_kl@released")[0], expected)


def test_val_kl_scales_the_teacher_by_the_students_head_width():
    narrow = Pair(hidden=16)
    expected = sum(relation_kl(narrow.s["v"][s], narrow.t["v"][t], 4, 4) for s, t in BLOCK_END)
    same(narrow.loss("val_kl@released")[0], expected)


def test_qkv_kl_matches_last_blocks_without_mask(pair):
    expected = sum(relation_kl(pair.s[x][1], pair.t[x][3], 8, 8) for x in "qkv")
    same(pair.loss("qkv_kl@released")[0], expected)


def test_minilm_preset_sums_its_two_terms_over_all_pairs(pair):
    value_part = sum(relation_kl(pair.s["v"][s], pair.t["v"][t], 8, 8) for s, t in BLOCK_END)
    same(pair.loss("minilm@released")[0], naive_att_kl(pair) + value_part)


def test_hid_seq_skip_counts_pads_and_embeddings(pair):
    expected = sum(F.mse_loss(pair.s["hidden"][s], pair.t["hidden"][t]) for s, t in SKIP_STATES)
    same(pair.loss("hid_seq@released")[0], expected)


def test_hid_seq_last(pair):
    expected = F.mse_loss(pair.s["hidden"][2], pair.t["hidden"][4])
    same(pair.loss("hid_seq(map='last')@released")[0], expected)


def test_hid_seq_combine_projects_the_teacher(pair):
    loss, distiller = pair.loss("hid_seq(map='combine')@released")
    layer = distiller.objective.terms["hid_seq"].projections[0]
    assert layer.weight.shape == (3 * 32, 5 * 32)
    target = layer(torch.cat(pair.t["hidden"], -1))
    same(loss, F.mse_loss(torch.cat(pair.s["hidden"], -1), target))
    loss.backward()
    assert layer.weight.grad.abs().sum() > 0


def test_hid_cls(pair):
    expected = sum(
        F.mse_loss(pair.s["hidden"][s][:, 0], pair.t["hidden"][t][:, 0]) for s, t in SKIP_STATES
    )
    same(pair.loss("hid_cls@released")[0], expected)


def test_pkd_sums_over_examples_with_embedding_and_last_state(pair):
    expected = sum(
        F.mse_loss(
            F.normalize(pair.s["hidden"][s][:, 0], dim=-1),
            F.normalize(pair.t["hidden"][t][:, 0], dim=-1),
            reduction="sum",
        )
        for s, t in SKIP_STATES
    )
    same(pair.loss("pkd@released")[0], expected)


def test_alp(pair):
    ours = torch.stack([h[:, 0] for h in pair.s["hidden"]], 1)
    theirs = torch.stack([h[:, 0] for h in pair.t["hidden"]], 1)
    mixed = torch.softmax(ours @ theirs.transpose(1, 2), -1) @ theirs
    same(pair.loss("alp@released")[0], F.mse_loss(ours, mixed))


@pytest.mark.parametrize("which", ["pair", "sharp"])
def test_att_pearson_sums_four_axes_of_the_last_blocks(which, request):
    pair = request.getfixturevalue(which)
    y_s = torch.softmax(pair.score_map(pair.s, 1), -1).double()
    y_t = torch.softmax(pair.score_map(pair.t, 3), -1).double()

    def one_minus_pearson(x, y):
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        return 1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-8)).mean()

    expected = one_minus_pearson(y_t, y_s)
    for axis in (2, 1, 0):
        expected = expected + one_minus_pearson(y_t.transpose(axis, 3), y_s.transpose(axis, 3))
    loss, distiller = pair.loss("att_pearson@released")
    same(loss, expected)
    key = distiller.student.bert.encoder.layer[1].attention.self.key.weight
    assert torch.autograd.grad(loss, key)[0].isfinite().all()


def test_kd_baseline(pair):
    z_s, z_t = pair.s["logits"], pair.t["logits"]
    kd = F.kl_div(torch.log_softmax(z_s / 2, -1), torch.softmax(z_t / 2, -1), reduction="sum") * 4
    ce = F.cross_entropy(z_s, pair.batch["labels"], reduction="sum")
    same(pair.loss("vanilla_kd@released")[0], (0.5 * ce + 0.5 * kd) / 3)


def test_hid_cls_contrast_joins_first_tokens_of_all_states(pair):
    pair.batch["index"] = torch.tensor([4, 0, 2])
    distiller = Distiller(pair.teacher, pair.student, "hid_cls_contrast@released", num_examples=6)
    contrast = copy.deepcopy(distiller.objective.terms["hid_cls_contrast"].contrast)
    assert (contrast.negatives, contrast.temperature, contrast.momentum) == (100, 0.07, 0.5)
    loss = distiller.train(False)(pair.batch).loss
    ours, theirs = (torch.cat([h[:, 0] for h in side["hidden"]], -1) for side in (pair.s, pair.t))
    labels, index = pair.batch["labels"], pair.batch.pop("index")
    same(loss, contrast.eval()(ours, theirs, index=index, labels=labels))
