"""attention_mse: reference against numpy, both chunked forms (Gram and tiles) against the reference."""

import numpy as np
import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import attention_mse as oracle_rows
from oracle import relative

from bertkd import functional, reference
from bertkd.ops.chunked import attention_mse as chunked
from bertkd.ops.chunked import tiles


@pytest.mark.parametrize("masked", [False, True])
def test_reference_matches_numpy(masked):
    student, teacher = qkv(3, 2, 9, 4, seed=0), qkv(3, 2, 9, 6, seed=1)
    mask = ragged_mask(3, 9, seed=2, empty_row=True) if masked else None
    rows = reference.attention_mse_rows(
        *(x.double() for x in (*student, *teacher)), mask, scale_s=0.7, scale_t=0.3
    )
    expected = oracle_rows(*student, *teacher, mask, 0.7, 0.3)
    np.testing.assert_allclose(rows.numpy(), expected, atol=1e-12)


def test_mean_is_over_real_pairs_and_heads():
    student, teacher = qkv(3, 2, 9, 4, seed=0), qkv(3, 2, 9, 4, seed=1)
    mask = ragged_mask(3, 9, seed=2)
    real = mask.numpy()[:, None].astype(bool)
    rows = oracle_rows(*student, *teacher, mask, 0.5, 0.5)
    pairs = 2 * (mask.sum(1) ** 2).sum().item()
    for impl in ("eager", "chunked"):
        loss = functional.attention_mse(*student, *teacher, mask, impl=impl)
        assert loss.item() == pytest.approx((rows * real).sum() / pairs, rel=1e-5)
        loss = functional.attention_mse(*student, *teacher, mask, count_pads=True, impl=impl)
        assert loss.item() == pytest.approx(rows.sum() / (3 * 2 * 9 * 9), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 17, 40]),
    widths=st.tuples(st.sampled_from([2, 4, 16]), st.sampled_from([4, 8])),
    masked=st.booleans(),
    count_pads=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    gram=st.booleans(),
    budget=st.sampled_from([7, 300, 1 << 19]),
    seed=st.integers(0, 99),
)
def test_chunked_equals_reference(
    batch, heads, length, widths, masked, count_pads, weighted, reduction, gram, budget, seed
):
    student = qkv(batch, heads, length, widths[0], seed=seed)
    teacher = qkv(batch, heads, length, widths[1], seed=seed + 1)
    options = {
        "mask": ragged_mask(batch, length, seed=seed, empty_row=seed % 3 == 0) if masked else None,
        "count_pads": count_pads,
        "row_weight": torch.rand(batch, length) if weighted else None,
        "reduction": reduction,
    }
    (q_s, k_s), (q_t, k_t) = ([x.double() for x in side] for side in (student, teacher))
    expected = value_and_grads(
        functional.attention_mse, [q_s, k_s], q_t, k_t, impl="eager", **options
    )
    # Products that happen to cancel do so in any arithmetic: the rounding of the products themselves is
    # allowed on top. With absolute values, against a negated teacher, all of them add up to their size.
    sizes = value_and_grads(
        functional.attention_mse,
        [q_s.abs(), k_s.abs()],
        -q_t.abs(),
        k_t.abs(),
        impl="eager",
        **options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_BUDGET", budget)
        patch.setattr(chunked, "gram_pays", lambda *_: gram)
        actual = value_and_grads(
            functional.attention_mse, student, *teacher, impl="chunked", **options
        )
    for got, want, size in zip(actual, expected, sizes, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + 1e-6 * size.norm()


@pytest.mark.parametrize("gram", [False, True])
def test_equal_networks_give_exactly_zero(gram, monkeypatch):
    monkeypatch.setattr(chunked, "gram_pays", lambda *_: gram)
    student = qkv(2, 2, 33, 8, seed=0)
    mask = ragged_mask(2, 33, seed=1)
    results = value_and_grads(functional.attention_mse, student, *student, mask, impl="chunked")
    assert all((x == 0).all() for x in results)


def test_gram_form_stays_accurate_near_convergence():
    """A student that differs by 1e-4 makes a loss of 1e-8: a Gram form that cancels would lose it."""
    teacher = qkv(2, 2, 300, 16, seed=0)
    noise = qkv(2, 2, 300, 16, seed=1)
    student = [x + 1e-4 * n for x, n in zip(teacher, noise, strict=True)]
    assert chunked.gram_pays(300, 16, 16)
    double = [[x.double() for x in side] for side in (student, teacher)]
    expected = value_and_grads(functional.attention_mse, double[0], *double[1], impl="eager")
    actual = value_and_grads(functional.attention_mse, student, *teacher, impl="chunked")
    for got, want in zip(actual, expected, strict=True):
        assert relative(got, want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gram", [False, True])
def test_low_precision_inputs_err_no_more_than_eager(dtype, gram, monkeypatch):
    monkeypatch.setattr(chunked, "gram_pays", lambda *_: gram)
    student, teacher = qkv(2, 3, 50, 8, seed=0, dtype=dtype), qkv(2, 3, 50, 8, seed=1)
    mask = ragged_mask(2, 50, seed=3)
    exact_inputs = [[x.double() for x in side] for side in (student, teacher)]
    exact = value_and_grads(
        functional.attention_mse, exact_inputs[0], *exact_inputs[1], mask, impl="eager"
    )
    eager = value_and_grads(functional.attention_mse, student, *teacher, mask, impl="eager")
    actual = value_and_grads(functional.attention_mse, student, *teacher, mask, impl="chunked")
    for got, same, want in zip(actual, eager, exact, strict=True):
        assert got.dtype == same.dtype
        assert relative(got, want) <= 2 * relative(same, want) + 1e-6


@pytest.mark.parametrize("gram", [False, True])
def test_fully_masked_sequences_are_zero(gram, monkeypatch, poisoned):
    monkeypatch.setattr(chunked, "gram_pays", lambda *_: gram)
    student, teacher = qkv(2, 2, 12, 4, seed=0), qkv(2, 2, 12, 4, seed=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    loss, *grads = value_and_grads(functional.attention_mse, student, *teacher, mask)
    assert loss > 0
    for grad in grads:
        assert (grad[0] != 0).any()
        assert (grad[1] == 0).all()


def test_gradients_in_float16_are_finite_where_scores_are_far_apart():
    # Summed over the keys they would leave its range, however small the loss scale.
    student, teacher = qkv(1, 2, 256, 64, seed=0, spread=16.0), qkv(1, 2, 256, 64, seed=1)
    (student, teacher) = ([x.half() for x in side] for side in (student, teacher))
    _, *grads = value_and_grads(functional.attention_mse, student, *teacher)
    exact = [[x.double() for x in side] for side in (student, teacher)]
    _, *wanted = value_and_grads(functional.attention_mse, exact[0], *exact[1])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max())


def test_released_threshold_zeroes_low_scores():
    student, teacher = qkv(1, 1, 16, 4, seed=0, spread=8.0), qkv(1, 1, 16, 4, seed=1, spread=8.0)
    maps = [(q @ k.transpose(-1, -2)) / 2 for q, k in (student, teacher)]
    assert maps[0].min() < -100
    maps = [torch.where(m <= -1e2, torch.zeros_like(m), m) for m in maps]
    loss = functional.attention_mse(*student, *teacher, min_score=-1e2)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(*maps))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_in_float64(gram, reduction, monkeypatch):
    monkeypatch.setattr(chunked, "gram_pays", lambda *_: gram)
    student, teacher = qkv(2, 2, 6, 3, seed=0), qkv(2, 2, 6, 4, seed=1)
    mask = ragged_mask(2, 6, seed=5)
    fixed = [x.double() for x in teacher]
    assert torch.autograd.gradcheck(
        lambda q, k: functional.attention_mse(
            q, k, *fixed, mask, reduction=reduction, impl="chunked"
        ),
        [x.double().requires_grad_() for x in student],
    )
