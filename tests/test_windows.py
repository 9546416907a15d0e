"""Blocks that attend to a window: the losses against numpy, the terms against the maps that such a model returns."""

import warnings

import numpy as np
import oracle
import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_batch, tiny_model

from bertkd import Capture, Distiller, create_student, functional, reference
from bertkd.ops.chunked import tiles

LOSSES = {"relation_kl": functional.relation_kl, "attention_mse": functional.attention_mse}


@pytest.mark.parametrize("window", [0, 2, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", sorted(LOSSES))
def test_reference_matches_numpy(op, masked, window):
    student, teacher = qkv(4, 2, 9, 4, seed=0), qkv(4, 2, 9, 6, seed=1)
    mask = ragged_mask(4, 9, seed=2, empty_row=True) if masked else None
    tensors = [x.double() for x in (*student, *teacher)]
    rows = getattr(reference, f"{op}_rows")(*tensors, mask, scale_s=0.7, scale_t=0.3, window=window)
    expected = getattr(oracle, op)(*student, *teacher, mask, 0.7, 0.3, window)
    np.testing.assert_allclose(rows.numpy(), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    op=st.sampled_from(sorted(LOSSES)),
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 2, 17, 40, 150]),
    window=st.sampled_from([0, 1, 5, 16, 200]),
    widths=st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([2, 16])),
    masked=st.booleans(),
    count_pads=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smallest=st.sampled_from([3, 128]),
    budget=st.sampled_from([7, 300, 1 << 19]),
    seed=st.integers(0, 99),
)
def test_chunked_equals_reference(
    op, batch, heads, length, window, widths, masked, count_pads, reduction, smallest, budget, seed
):
    student = qkv(batch, heads, length, widths[0], seed=seed)
    teacher = qkv(batch, heads, length, widths[1], seed=seed + 1)
    mask = ragged_mask(batch, length, seed=seed, empty_row=seed % 3 == 0) if masked else None
    options = {"count_pads": count_pads, "reduction": reduction, "window": window, "mask": mask}
    double = [[x.double() for x in side] for side in (student, teacher)]
    expected = value_and_grads(LOSSES[op], double[0], *double[1], impl="eager", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_BUDGET", budget)
        patch.setattr(tiles, "WINDOW_ROWS", smallest)
        actual = value_and_grads(LOSSES[op], student, *teacher, impl="chunked", **options)
    for got, want in zip(actual, expected, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + 2e-6


@pytest.mark.parametrize("op", sorted(LOSSES))
def test_no_score_outside_of_the_tiles_along_the_diagonal_is_computed(op, monkeypatch):
    computed = []
    score_tile = tiles.score_tile

    def counted(a, b, *rest):
        computed.append(a.shape[0] * a.shape[1] * b.shape[1])
        return score_tile(a, b, *rest)

    for module in ("relation_kl", "attention_mse"):
        monkeypatch.setattr(f"bertkd.ops.chunked.{module}.score_tile", counted)
    tensors = qkv(1, 1, 2000, 4, seed=0) + qkv(1, 1, 2000, 4, seed=1)
    LOSSES[op](*tensors, window=16, impl="chunked")
    assert sum(computed) <= 2 * 2000 * (tiles.WINDOW_ROWS + 2 * 16)


@pytest.mark.parametrize("impl", ["eager", "chunked", "auto"])
def test_the_mean_of_squares_is_over_the_pairs_inside(impl):
    student, teacher = qkv(2, 3, 12, 4, seed=0), qkv(2, 3, 12, 4, seed=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    at = torch.arange(12)
    near = ((at[:, None] - at).abs() <= 2).expand(2, 1, -1, -1)
    squares = (student[0] @ student[1].mT / 2 - teacher[0] @ teacher[1].mT / 2).square()
    real = near & mask[:, None, :, None] & mask[:, None, None, :]
    for count_pads, inside in ((False, real), (True, near)):
        total = squares.masked_fill(~(inside & mask[:, None, None, :]), 0).sum()
        loss = functional.attention_mse(
            *student, *teacher, mask, window=2, count_pads=count_pads, impl=impl
        )
        torch.testing.assert_close(loss, total / (3 * inside.sum()))
    rows = functional.attention_mse(*student, *teacher, mask, window=2, reduction="none", impl=impl)
    keys = (near & mask[:, None, None, :]).sum(-1).clamp_min(1)
    expected = squares.masked_fill(~(near & mask[:, None, None, :]), 0).sum(-1) / keys
    torch.testing.assert_close(rows, expected * mask[:, None])


@pytest.mark.parametrize("op", sorted(LOSSES))
def test_a_window_that_holds_every_sequence_is_none(op):
    tensors = qkv(2, 2, 9, 4, seed=0) + qkv(2, 2, 9, 4, seed=1)
    whole = LOSSES[op](*tensors)
    for window in (8, 9, 10**12, np.int64(8)):
        assert torch.equal(LOSSES[op](*tensors, window=window), whole)
    assert not torch.equal(LOSSES[op](*tensors, window=7), whole)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (-1, ValueError, r"window \(tokens to either side\) must be at least 0, got -1"),
        (2.0, TypeError, r"window \(tokens to either side\) must be a whole number, got 2\.0"),
        (True, TypeError, "must be a whole number, got True"),
        ((64, 64), TypeError, "must be a whole number"),
    ],
)
def test_no_window(window, error, message):
    tensors = qkv(1, 1, 9, 4, seed=0) * 2
    for loss in LOSSES.values():
        with pytest.raises(error, match=message):
            loss(*tensors, window=window)


def windowed_pair(student_window=4, **overrides):
    """ModernBERT's first block attends to all tokens, the next two to a window, which here is 2 to either side."""
    teacher = tiny_model("modernbert", layers=4, local_attention=4, **overrides)
    student = tiny_model(
        "modernbert", layers=3, local_attention=student_window, seed=1, **overrides
    )
    return teacher, student


@pytest.mark.parametrize("side", ["right", "left"])
def test_terms_compare_the_maps_that_the_models_return(side):
    models = windowed_pair(attn_implementation="eager")
    batch = tiny_batch(models[0], length=20)
    if side == "left":
        batch = {name: x.flip(1) for name, x in batch.items()}
    assert 0 < batch["attention_mask"].float().mean() < 1
    real = batch["attention_mask"].bool()
    pairs = [(0, 0), (1, 1), (2, 2)]
    with torch.no_grad():
        maps_t, maps_s = (m(**batch, output_attentions=True).attentions for m in models)
    expected = 0.0
    for s, t in pairs:
        terms = torch.xlogy(maps_t[t], maps_t[t]) - torch.xlogy(maps_t[t], maps_s[s])
        rows = terms.masked_fill(maps_t[t] == 0, 0).sum(-1)
        expected += rows.masked_fill(~real[:, None], 0).sum() / (real.sum() * rows.shape[1])
    for model in models:
        model.set_attn_implementation("sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = Distiller(*models, "att_kl", layer_map=pairs)(batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective", ["att_kl", "att_mse", "att_pearson", "att_pearson(axes='all')"]
)
def test_the_terms_of_blocks_with_and_without_windows_add_up(objective):
    models = windowed_pair()
    batch = tiny_batch(models[0], length=20)
    pairs = [(0, 0), (1, 1), (2, 2)]
    together = Distiller(*models, objective, layer_map=pairs)(batch).loss
    each = [Distiller(*models, objective, layer_map=[pair])(batch).loss for pair in pairs]
    torch.testing.assert_close(together, sum(each))
    options = f"{objective[:-1]}, " if objective.endswith(")") else f"{objective}("
    mean = Distiller(*models, f"{options}reduction='mean')", layer_map=pairs)(batch).loss
    torch.testing.assert_close(mean, together / 3)


@pytest.mark.parametrize("objective", ["att_mse", "att_pearson", "att_pearson(axes='all')"])
def test_terms_look_at_no_key_outside_of_the_window(objective):
    models = windowed_pair()
    batch = tiny_batch(models[0], length=20)
    options = {"layer_map": [(1, 1)]}
    loss = Distiller(*models, objective, **options)(batch).loss
    # The same from the captured queries and keys, with all pairs outside of the window taken out by hand.
    with torch.no_grad():
        ours, theirs = (Capture(m, blocks=[1])(**batch) for m in reversed(models))
    at = torch.arange(20)
    near = (at[:, None] - at).abs() <= 2
    assert ours.window == theirs.window == {1: 2}
    real = batch["attention_mask"].bool()
    keys = near & real[:, None, None, :]
    scores = [x.q[1] @ x.k[1].mT * x.scale[1] for x in (ours, theirs)]
    if objective == "att_mse":
        pairs = keys & real[:, None, :, None]
        expected = (scores[0] - scores[1]).square()[pairs.expand_as(scores[0])].mean()
    else:
        maps = [x.masked_fill(~keys, -torch.inf).softmax(-1).nan_to_num() for x in scores]
        expected = pearson_of_maps(*maps, keys, real, along_all="axes" in objective)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def pearson_of_maps(ours, theirs, keys, real, along_all):
    if along_all:
        return sum(
            1 - correlation(ours.movedim(d, -1), theirs.movedim(d, -1)).mean() for d in range(4)
        )
    rows = []
    for b, h, i in np.ndindex(*ours.shape[:3]):
        seen = keys[b, 0, i]
        if real[b, i] and seen.sum() > 1:
            rows.append(1 - correlation(ours[b, h, i, seen], theirs[b, h, i, seen]))
    return torch.stack(rows).mean()


def correlation(x, y):
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-8)


@pytest.mark.parametrize("objective", ["att_kl", "att_mse", "att_pearson"])
def test_windows_that_differ_are_compared_over_all_tokens(objective):
    # The first blocks attend to all tokens, the second to 2 and to 3 tokens to either side.
    teacher, student = windowed_pair(student_window=6)
    batch = tiny_batch(teacher, length=12)
    for pairs, warned in (([(0, 0)], 0), ([(0, 0), (1, 1)], 1), ([(1, 0)], 1)):
        distiller = Distiller(teacher, student, objective, layer_map=pairs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller(batch)
            distiller(batch)
        assert sum("the same window" in str(each.message) for each in caught) == warned
    ours, theirs = (Capture(m, blocks=[1])(**batch) for m in (student, teacher))
    if objective == "att_kl":
        whole = functional.attention_kl(
            ours.q[1], ours.k[1], theirs.q[1], theirs.k[1], batch["attention_mask"]
        )
        loss = Distiller(teacher, student, objective, layer_map=[(1, 1)])(batch).loss
        torch.testing.assert_close(loss, whole)


def test_a_student_made_of_its_teachers_blocks_keeps_their_windows():
    teacher, _ = windowed_pair()
    student = create_student(teacher, "uniform:2")
    batch = tiny_batch(teacher, length=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Distiller(teacher, student, "att_kl")(batch).loss > 0
    assert Capture(student, blocks=[0, 1])(**batch).window == {0: 2, 1: None}
