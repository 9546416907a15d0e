"""relation_kl, attention_kl, value_relation_kl: reference against numpy, chunked against the reference."""

import numpy as np
import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relation_kl as oracle_rows
from oracle import relative

from bertkd import functional, reference
from bertkd.ops.chunked import tiles


@pytest.mark.parametrize("masked", [False, True])
def test_reference_matches_numpy(masked):
    student, teacher = qkv(3, 2, 9, 4, seed=0), qkv(3, 2, 9, 6, seed=1)
    mask = ragged_mask(3, 9, seed=2, empty_row=True) if masked else None
    rows = reference.relation_kl_rows(
        *(x.double() for x in (*student, *teacher)), mask, scale_s=0.7, scale_t=0.3
    )
    expected = oracle_rows(*student, *teacher, mask, 0.7, 0.3)
    np.testing.assert_allclose(rows.numpy(), expected, atol=1e-12)


def test_mean_is_over_real_rows_and_heads():
    student, teacher = qkv(3, 2, 9, 4, seed=0), qkv(3, 2, 9, 4, seed=1)
    mask = ragged_mask(3, 9, seed=2)
    rows = oracle_rows(*student, *teacher, mask, 0.5, 0.5)
    real = np.broadcast_to(mask.numpy()[:, None].astype(bool), rows.shape)
    for impl in ("eager", "chunked"):
        loss = functional.attention_kl(*student, *teacher, mask, impl=impl)
        assert loss.item() == pytest.approx(rows[real].mean(), rel=1e-5)
        loss = functional.attention_kl(*student, *teacher, mask, count_pads=True, impl=impl)
        assert loss.item() == pytest.approx(rows.mean(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 2, 17, 40]),
    widths=st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([2, 16])),
    masked=st.booleans(),
    count_pads=st.booleans(),
    weighted=st.sampled_from(["none", "rows", "sequences"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.sampled_from([1.0, 2.5]),
    budget=st.sampled_from([7, 300, 1 << 19]),
    seed=st.integers(0, 99),
)
def test_chunked_equals_reference(
    batch, heads, length, widths, masked, count_pads, weighted, reduction, temperature, budget, seed
):
    student = qkv(batch, heads, length, widths[0], seed=seed)
    teacher = qkv(batch, heads, length, widths[1], seed=seed + 1)
    mask = ragged_mask(batch, length, seed=seed, empty_row=seed % 3 == 0) if masked else None
    shape = {"none": None, "rows": (batch, length), "sequences": (batch,)}[weighted]
    options = {
        "mask": mask,
        "count_pads": count_pads,
        "row_weight": None if shape is None else torch.rand(shape),
        "reduction": reduction,
        "temperature": temperature,
        "t_squared": True,
    }
    double = [[x.double() for x in side] for side in (student, teacher)]
    expected = value_and_grads(
        functional.attention_kl, double[0], *double[1], impl="eager", **options
    )
    with pytest.MonkeyPatch.context() as patch:
        # Small budgets force row blocks, head groups and groups of sequences.
        patch.setattr(tiles, "CPU_BUDGET", budget)
        actual = value_and_grads(
            functional.attention_kl, student, *teacher, impl="chunked", **options
        )
    for got, want in zip(actual, expected, strict=True):
        # 1e-5 relative, over an absolute floor where the exact value is 0 (one key: the KL is 0).
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_err_no_more_than_eager(dtype):
    student = qkv(2, 3, 50, 16, seed=0, dtype=dtype)
    teacher = qkv(2, 3, 50, 16, seed=1, dtype=torch.float32)
    mask = ragged_mask(2, 50, seed=3)
    exact_inputs = [[x.double() for x in side] for side in (student, teacher)]
    exact = value_and_grads(
        functional.attention_kl, exact_inputs[0], *exact_inputs[1], mask, impl="eager"
    )
    eager = value_and_grads(functional.attention_kl, student, *teacher, mask, impl="eager")
    chunked = value_and_grads(functional.attention_kl, student, *teacher, mask, impl="chunked")
    assert chunked[0].dtype == torch.float32
    for got, same, want in zip(chunked, eager, exact, strict=True):
        assert got.dtype == same.dtype
        assert relative(got, want) <= 2 * relative(same, want) + 1e-6


def test_loss_scale_of_fp16_training_does_not_overflow():
    student, teacher = qkv(1, 2, 8, 4, seed=0, dtype=torch.float16), qkv(1, 2, 8, 4, seed=1)
    q = student[0].detach().requires_grad_()
    (functional.attention_kl(q, student[1], *teacher) * 2.0**17).backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad.abs().max() > 1


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_fully_masked_rows_are_zero_with_zero_gradient(impl, poisoned):
    student, teacher = qkv(2, 2, 12, 4, seed=0), qkv(2, 2, 12, 4, seed=1)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    results = value_and_grads(functional.attention_kl, student, *teacher, mask, impl=impl)
    assert all((x == 0).all() for x in results)
    mask[0] = True
    for reduction in ("mean", "none"):
        loss, *grads = value_and_grads(
            functional.attention_kl, student, *teacher, mask, reduction=reduction, impl=impl
        )
        assert torch.isfinite(loss).all()
        for grad in grads:
            assert (grad[0] != 0).any()
            assert (grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_scores_make_no_nan(dtype):
    student = qkv(1, 2, 16, 4, seed=0, dtype=dtype, spread=50.0)
    teacher = qkv(1, 2, 16, 4, seed=1, dtype=dtype, spread=50.0)
    scores = student[0].float() @ student[1].float().transpose(-1, -2)
    assert scores.abs().max() > 1e4
    for impl in ("eager", "chunked"):
        results = value_and_grads(
            functional.attention_kl, student, *teacher, scale_s=1.0, scale_t=1.0, impl=impl
        )
        assert all(torch.isfinite(x).all() for x in results)


@pytest.mark.parametrize("masked", [False, True])
def test_equal_networks_give_exactly_zero(masked):
    student = qkv(3, 2, 33, 8, seed=0)
    mask = ragged_mask(3, 33, seed=1) if masked else None
    for result in value_and_grads(functional.attention_kl, student, *student, mask, impl="chunked"):
        assert (result == 0).all()
    # Autograd of the definition rounds its two halves of the gradient separately.
    for result in value_and_grads(functional.attention_kl, student, *student, mask, impl="eager"):
        assert result.abs().max() < 1e-7


def test_shift_of_all_scores_changes_nothing():
    student, teacher = qkv(1, 1, 20, 4, seed=0), qkv(1, 1, 20, 4, seed=1)
    # A key component that is the same for all keys adds a constant to every row's scores.
    q = torch.cat([teacher[0], torch.full((1, 1, 20, 1), 100.0)], -1)
    k = torch.cat([teacher[1], torch.full((1, 1, 20, 1), 10.0)], -1)
    options = {"scale_s": 0.5, "scale_t": 0.5, "impl": "chunked"}
    plain = functional.attention_kl(*student, *teacher, **options)
    shifted = functional.attention_kl(*student, q, k, **options)
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=0)


def test_relation_heads_compare_different_head_counts():
    generator = torch.Generator().manual_seed(0)
    joined_s, joined_t = (
        torch.randn(2, 7, 24, generator=generator),
        torch.randn(2, 7, 36, generator=generator),
    )
    v_s = joined_s.view(2, 7, 3, 8).transpose(1, 2)
    v_t = joined_t.view(2, 7, 6, 6).transpose(1, 2)
    split_s = joined_s.view(2, 7, 12, 2).transpose(1, 2)
    split_t = joined_t.view(2, 7, 12, 3).transpose(1, 2)
    expected = oracle_rows(split_s, split_s, split_t, split_t, None, 2**-0.5, 3**-0.5).mean()
    for impl in ("eager", "chunked"):
        loss = functional.value_relation_kl(v_s, v_t, relation_heads=12, impl=impl)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_self_relation_gradient_reaches_both_roles():
    (v_s, _), (v_t, _) = qkv(2, 2, 11, 4, seed=0), qkv(2, 2, 11, 4, seed=1)
    grads = [
        value_and_grads(functional.value_relation_kl, [v_s.double()], v_t.double(), impl=impl)[1]
        for impl in ("eager", "chunked")
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_released_clamp_is_eager_only_and_clamps():
    student, teacher = qkv(1, 1, 16, 4, seed=0, spread=6.0), qkv(1, 1, 16, 4, seed=1)
    p_s = torch.softmax(student[0] @ student[1].transpose(-1, -2) / 2, -1)
    p_t = torch.softmax(teacher[0] @ teacher[1].transpose(-1, -2) / 2, -1)
    expected = (p_t * (p_t.log() - p_s.clamp(1e-7, 1).log())).sum(-1).mean()
    assert p_s.min() < 1e-7
    loss = functional.attention_kl(*student, *teacher, min_prob=1e-7)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"chunked.*min_prob.*eager"):
        functional.attention_kl(*student, *teacher, min_prob=1e-7, impl="chunked")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_in_float64(reduction):
    student, teacher = qkv(2, 2, 6, 3, seed=0), qkv(2, 2, 6, 4, seed=1)
    mask = ragged_mask(2, 6, seed=5)
    inputs = [x.double().requires_grad_() for x in student]
    fixed = [x.double() for x in teacher]
    assert torch.autograd.gradcheck(
        lambda q, k: functional.attention_kl(
            q, k, *fixed, mask, reduction=reduction, impl="chunked"
        ),
        inputs,
    )


def test_teacher_gets_no_gradient():
    student, teacher = qkv(1, 2, 5, 4, seed=0), qkv(1, 2, 5, 4, seed=1)
    teacher = [x.requires_grad_() for x in teacher]
    student = [x.requires_grad_() for x in student]
    functional.attention_kl(*student, *teacher).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in student)


def test_without_gradients_the_value_is_the_same():
    student, teacher = qkv(2, 2, 30, 4, seed=0), qkv(2, 2, 30, 4, seed=1)
    with_grad, *_ = value_and_grads(functional.attention_kl, student, *teacher)
    with torch.no_grad():
        torch.testing.assert_close(functional.attention_kl(*student, *teacher), with_grad)


def test_pads_are_not_computed_and_not_read(poisoned):
    student, teacher = qkv(2, 2, 24, 4, seed=0), qkv(2, 2, 24, 4, seed=1)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[:, 15:] = 0
    short = value_and_grads(
        functional.attention_kl, [x[:, :, :15] for x in student], *(x[:, :, :15] for x in teacher)
    )
    for x in (*student, *teacher):
        x[:, :, 15:] = float("nan")
    for impl in ("auto", "chunked"):
        padded = value_and_grads(functional.attention_kl, student, *teacher, mask, impl=impl)
        torch.testing.assert_close(padded[0], short[0])
        for long, want in zip(padded[1:], short[1:], strict=True):
            torch.testing.assert_close(long[:, :, :15], want)
            assert (long[:, :, 15:] == 0).all()
