"""softmax_kl, logit_kl, linear_kl: eager against torch's kl_div, chunked against eager."""

import pytest
import torch
from attention_cases import exact, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative
from torch.nn.functional import kl_div, log_softmax, softmax

from bertkd import functional
from bertkd.ops.chunked import softmax_kl as row_losses
from bertkd.ops.chunked import tiles
from bertkd.ops.implementations import implementation


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_torch_kl_div(impl, temperature):
    z_s, z_t = normal(2, 5, 11, seed=0), normal(2, 5, 11, seed=1)
    log_p, p = log_softmax(z_s / temperature, -1), softmax(z_t / temperature, -1)
    expected = kl_div(log_p.view(10, -1), p.view(10, -1), reduction="batchmean")
    loss = functional.softmax_kl(z_s, z_t, temperature=temperature, impl=impl)
    torch.testing.assert_close(loss, expected)
    loss = functional.logit_kl(z_s, z_t, temperature=temperature, impl=impl)
    torch.testing.assert_close(loss, expected * temperature**2)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    kept = mask.bool()
    expected = kl_div(log_p[kept], p[kept], reduction="batchmean")
    loss = functional.softmax_kl(z_s, z_t, mask, temperature=temperature, impl=impl)
    torch.testing.assert_close(loss, expected)


CASES = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([1, 3, 20]),
        "classes": st.sampled_from([1, 2, 33]),
        "masked": st.booleans(),
        "weighted": st.booleans(),
        "bias": st.booleans(),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "temperature": st.sampled_from([1.0, 2.0]),
        "budget": st.sampled_from([3, 100, 1 << 19]),
        "seed": st.integers(0, 99),
    }
)


def check(loss, case, student, teacher):
    mask = torch.rand(case["rows"], generator=torch.Generator().manual_seed(case["seed"])) > 0.4
    options = {
        "mask": mask if case["masked"] else None,
        "row_weight": normal(case["rows"], seed=7).abs() if case["weighted"] else None,
        "reduction": case["reduction"],
        "temperature": case["temperature"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_BUDGET", case["budget"])
        patch.setattr(row_losses, "LEAST_ROWS", 1)
        actual = value_and_grads(loss, student, *teacher, impl="chunked", **options)
    expected = exact(loss, student, *teacher, **options)
    for got, (want, move) in zip(actual, expected, strict=True):
        # A KL near 0 is the difference of logarithms that are not.
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + 1e-6 + move


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_softmax_kl_equals_reference(case):
    shape = (case["rows"], case["classes"])
    check(
        functional.softmax_kl, case, [normal(*shape, seed=case["seed"])], [normal(*shape, seed=1)]
    )


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_linear_kl_equals_reference(case):
    rows, classes = case["rows"], case["classes"]
    student = [normal(rows, 4, seed=case["seed"]), normal(classes, 4, seed=1)]
    teacher = [normal(rows, 6, seed=2), normal(classes, 6, seed=3)]
    if case["bias"]:
        student.append(normal(classes, seed=4))
        teacher.append(normal(classes, seed=5))

    def loss(h_s, w_s, *rest, **options):
        biases = {"bias_s": rest[0], "bias_t": rest[3]} if case["bias"] else {}
        h_t, w_t = rest[1:3] if case["bias"] else rest
        return functional.linear_kl(h_s, w_s, h_t, w_t, **biases, **options)

    check(loss, case, student, teacher)


def test_linear_kl_projects_only_rows_that_count():
    """Rows that do not count may hold anything, since nothing is computed from them."""
    h_s, w_s, h_t, w_t = (
        normal(*s, seed=i) for i, s in enumerate([(6, 4), (9, 4), (6, 5), (9, 5)])
    )
    mask = torch.tensor([1, 0, 1, 0, 0, 1])
    spoiled = h_s.clone()
    spoiled[mask == 0] = float("nan")
    results = [
        value_and_grads(functional.linear_kl, [h, w_s], h_t, w_t, mask) for h in (h_s, spoiled)
    ]
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("impl", ["chunked", "auto"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trained", [(0,), (1, 2), (0, 2), (1,)])
def test_linear_kl_of_frozen_tensors(trained, reduction, impl):
    shapes = [(6, 4), (9, 4), (9,), (6, 5), (9, 5)]
    tensors = [normal(*s, seed=i) for i, s in enumerate(shapes)]
    grads = []
    for run, dtype in (("eager", torch.float64), (impl, torch.float32)):
        h_s, w_s, bias, h_t, w_t = leaves = [x.to(dtype) for x in tensors]
        for i in trained:
            leaves[i].requires_grad_()
        options = {"bias_s": bias, "reduction": reduction, "impl": run}
        functional.linear_kl(h_s, w_s, h_t, w_t, **options).sum().backward()
        grads.append([x.grad for x in leaves])
    for i, (want, got) in enumerate(zip(*grads, strict=True)):
        assert (got is not None) == (i in trained)
        if i in trained:
            torch.testing.assert_close(got, want.float())


def test_gradcheck_in_float64():
    z_s, z_t = normal(4, 5, seed=0).double(), normal(4, 5, seed=1).double()
    assert torch.autograd.gradcheck(
        lambda z: functional.softmax_kl(z, z_t, temperature=2.0, reduction="none", impl="chunked"),
        [z_s.requires_grad_()],
    )
    h_t, w_t = normal(4, 3, seed=2).double(), normal(7, 3, seed=3).double()
    leaves = [
        normal(*s, seed=4 + i).double().requires_grad_()
        for i, s in enumerate([(4, 2), (7, 2), (7,)])
    ]
    assert torch.autograd.gradcheck(
        lambda h, w, b: functional.linear_kl(h, w, h_t, w_t, bias_s=b, impl="chunked"), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errs_no_more_than_eager(dtype, poisoned):
    z_s, z_t = normal(6, 50, seed=0, dtype=dtype), normal(6, 50, seed=1)
    exact = value_and_grads(functional.softmax_kl, [z_s.double()], z_t.double(), impl="eager")
    eager = value_and_grads(functional.softmax_kl, [z_s], z_t, impl="eager")
    actual = value_and_grads(functional.softmax_kl, [z_s], z_t, impl="chunked")
    assert actual[1].dtype == dtype
    for got, same, want in zip(actual, eager, exact, strict=True):
        assert relative(got, want) <= 2 * relative(same, want) + 1e-6


def test_huge_logits_and_equal_logits():
    z_s, z_t = normal(4, 9, seed=0) * 1e4, normal(4, 9, seed=1) * 1e4
    results = value_and_grads(functional.softmax_kl, [z_s], z_t)
    assert all(torch.isfinite(x).all() for x in results)
    assert all((x == 0).all() for x in value_and_grads(functional.softmax_kl, [z_s], z_s))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("shift_s", "shift_t"), [(1e4, 1e4), (1e5, -1e5), (0.0, 1e6)])
def test_a_shift_of_the_logits_costs_no_digits(shift_s, shift_t, temperature):
    z_s, z_t = normal(4, 30, seed=0) + shift_s, normal(4, 30, seed=1) + shift_t
    options = {"temperature": temperature}
    want = value_and_grads(functional.softmax_kl, [z_s.double()], z_t.double(), **options)
    got = value_and_grads(functional.softmax_kl, [z_s], z_t, impl="chunked", **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-7)


def test_nothing_counts_gives_zero():
    z_s, z_t = normal(3, 4, seed=0), normal(3, 4, seed=1)
    none = torch.zeros(3, dtype=torch.bool)
    assert all((x == 0).all() for x in value_and_grads(functional.softmax_kl, [z_s], z_t, none))
    args = (normal(4, 2, seed=3), normal(3, 2, seed=2), normal(4, 2, seed=3))
    results = value_and_grads(functional.linear_kl, [z_s[:, :2], args[0]], args[1], args[2], none)
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("impl", ["chunked", "auto"])
def test_rows_that_do_not_count_are_not_projected_without_a_reduction(impl, grad, monkeypatch):
    projected = []

    def spied(definition):
        def spy(h_s, *rest):
            projected.append(h_s.shape[0])
            return definition(h_s, *rest)

        return spy

    for module in map(implementation, ("chunked", "native")):
        monkeypatch.setattr(module, "linear_kl_rows", spied(module.linear_kl_rows))
    h_s, h_t = normal(7, 4, seed=0).requires_grad_(grad), normal(7, 4, seed=1)
    w_s, w_t = normal(9, 4, seed=2), normal(9, 4, seed=3)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0])
    got = functional.linear_kl(h_s, w_s, h_t, w_t, mask, reduction="none", impl=impl)
    want = functional.linear_kl(h_s, w_s, h_t, w_t, mask, reduction="none", impl="eager")
    torch.testing.assert_close(got, want)
    assert projected == [3]
    if grad:
        gradients = [torch.autograd.grad(x.sum(), h_s)[0] for x in (got, want)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", ["chunked", "auto"])
def test_a_teacher_in_inference_mode(reduction, impl):
    z_s = normal(5, 6, seed=0)
    with torch.inference_mode():
        z_t = normal(5, 6, seed=1) + 0
    assert z_t.is_inference()
    options = {"reduction": reduction, "impl": impl}
    got = value_and_grads(functional.softmax_kl, [z_s], z_t, **options)
    want = value_and_grads(functional.softmax_kl, [z_s], z_t.clone(), **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_a_common_shift_of_all_logits_costs_no_accuracy(impl):
    # Multiples of 2^-10, which 1000 can be added to without rounding.
    z_s, z_t = ((normal(20, 33, seed=i) * 1024).round() / 1024 for i in range(2))
    want = functional.softmax_kl(z_s.double(), z_t.double(), reduction="none", impl="eager")
    got = functional.softmax_kl(z_s + 1000, z_t + 1000, reduction="none", impl=impl)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_a_batch_of_upstream_gradients():
    z_s, z_t = normal(5, 6, seed=0).requires_grad_(), normal(5, 6, seed=1)
    factors = torch.tensor([1.0, 2.0, 0.0])
    (got,) = torch.autograd.grad(
        functional.softmax_kl(z_s, z_t), z_s, factors, is_grads_batched=True
    )
    (one,) = torch.autograd.grad(functional.softmax_kl(z_s, z_t), z_s)
    torch.testing.assert_close(got, factors.view(3, 1, 1) * one)


def test_a_single_row_takes_a_mask_and_a_weight_without_dimensions():
    z_s, z_t = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    real, two = torch.tensor(True), torch.tensor(2.0)
    loss = functional.softmax_kl(z_s, z_t, real, row_weight=two)
    torch.testing.assert_close(loss, 2 * functional.softmax_kl(z_s, z_t))
