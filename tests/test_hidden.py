"""hidden_mse, hidden_combine_mse, hidden_cosine: eager against torch's own losses, chunked against eager."""

import pytest
import torch
from attention_cases import exact, ragged_mask, value_alone, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative
from torch.nn.functional import cosine_similarity, linear, mse_loss

from bertkd import functional, modules
from bertkd.ops.chunked import softmax_kl as row_losses
from bertkd.ops.chunked import tiles


def states(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_equals_torch_losses_without_pads(impl):
    h_s, h_t, weight, bias = (
        states(2, 5, 6, seed=0),
        states(2, 5, 4, seed=1),
        states(4, 6, seed=2),
        states(4, seed=3),
    )
    loss = functional.hidden_mse(h_s, h_t, weight=weight, bias=bias, impl=impl)
    torch.testing.assert_close(loss, mse_loss(linear(h_s, weight, bias), h_t))
    others = [states(2, 5, 6, seed=i) for i in (4, 5, 6)]
    loss = functional.hidden_mse([h_s, others[0]], others[1:], impl=impl)
    torch.testing.assert_close(loss, mse_loss(h_s, others[1]) + mse_loss(others[0], others[2]))
    loss = functional.hidden_cosine(h_s, others[0], impl=impl)
    torch.testing.assert_close(loss, (1 - cosine_similarity(h_s, others[0], -1)).mean())
    weight, bias = states(12, 10, seed=7), states(12, seed=8)
    loss = functional.hidden_combine_mse(
        [h_s, others[0]], [others[1], h_t], weight, bias, impl=impl
    )
    target = linear(torch.cat([others[1], h_t], -1), weight, bias)
    torch.testing.assert_close(loss, mse_loss(torch.cat([h_s, others[0]], -1), target))


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_mean_is_over_real_tokens(impl):
    h_s, h_t = states(3, 7, 4, seed=0), states(3, 7, 4, seed=1)
    mask = ragged_mask(3, 7, seed=2)
    real = mask.bool()
    loss = functional.hidden_mse(h_s, h_t, mask, impl=impl)
    torch.testing.assert_close(loss, mse_loss(h_s[real], h_t[real]))
    loss = functional.hidden_mse(h_s, h_t, mask, count_pads=True, impl=impl)
    torch.testing.assert_close(loss, mse_loss(h_s, h_t))
    loss = functional.hidden_cosine(h_s, h_t, mask, impl=impl)
    torch.testing.assert_close(loss, (1 - cosine_similarity(h_s[real], h_t[real], -1)).mean())


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.sampled_from([1, 5, 19]),
        "widths": st.tuples(st.sampled_from([1, 6]), st.sampled_from([3, 6])),
        "masked": st.booleans(),
        "weighted": st.booleans(),
        "bias": st.booleans(),
        "budget": st.sampled_from([5, 40, 1 << 19]),
        "seed": st.integers(0, 99),
    }
)


def check(loss, inputs, *rest, budget, **options):
    """Chunked in float32 against eager in float64, value and every gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_BUDGET", budget)
        patch.setattr(row_losses, "LEAST_ROWS", 1)
        actual = value_and_grads(loss, inputs, *rest, impl="chunked", **options)
        actual.append(value_alone(loss, [*inputs, *rest], impl="chunked", **options))
    expected = exact(loss, inputs, *rest, **options)
    for got, (want, move) in zip(actual, [*expected, expected[0]], strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + move


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_projected_mse_equals_reference(case):
    rows = (case["batch"], case["length"])
    width_s, width_t = case["widths"]
    inputs = [states(*rows, width_s, seed=case["seed"]), states(width_t, width_s, seed=1)]
    inputs += [states(width_t, seed=2)] if case["bias"] else []

    def loss(h_s, weight, *rest, **options):
        bias = rest[0] if case["bias"] else None
        return functional.hidden_mse(h_s, rest[-1], weight=weight, bias=bias, **options)

    check(loss, inputs, states(*rows, width_t, seed=3), **_common(case, rows))


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_several_states_equal_reference(case):
    rows = (case["batch"], case["length"])
    students = [states(*rows, case["widths"][1], seed=case["seed"] + i) for i in range(3)]

    def loss(*tensors, **options):
        return functional.hidden_mse(tensors[:3], tensors[3:], **options)

    teachers = [states(*rows, case["widths"][1], seed=50 + i) for i in range(3)]
    check(loss, students, *teachers, **_common(case, rows))


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_combine_equals_reference(case):
    rows = (case["batch"], case["length"])
    width_s, width_t = case["widths"]
    inputs = [states(*rows, width_s, seed=case["seed"] + i) for i in range(2)]
    inputs.append(states(2 * width_s, 3 * width_t, seed=4))
    inputs += [states(2 * width_s, seed=5)] if case["bias"] else []

    def loss(first, second, weight, *rest, **options):
        bias = rest[0] if case["bias"] else None
        return functional.hidden_combine_mse([first, second], rest[-3:], weight, bias, **options)

    teachers = [states(*rows, width_t, seed=60 + i) for i in range(3)]
    check(loss, inputs, *teachers, **_common(case, rows))


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_cosine_equals_reference(case):
    rows = (case["batch"], case["length"])
    h_s = states(*rows, 6, seed=case["seed"])
    check(functional.hidden_cosine, [h_s], states(*rows, 6, seed=900), **_common(case, rows))


def _common(case, rows):
    mask = ragged_mask(*rows, seed=case["seed"], empty_row=case["seed"] % 3 == 0)
    return {
        "mask": mask if case["masked"] else None,
        "row_weight": states(*rows, seed=8).abs() if case["weighted"] else None,
        "budget": case["budget"],
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [functional.hidden_mse, functional.hidden_cosine])
@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_a_teacher_in_inference_mode(loss, reduction, impl):
    h_s = states(3, 6, seed=0)
    with torch.inference_mode():
        h_t = states(3, 6, seed=1) + 0
    assert h_t.is_inference()
    options = {"reduction": reduction, "impl": impl}
    got = value_and_grads(loss, [h_s], h_t, **options)
    want = value_and_grads(loss, [h_s], h_t.clone(), **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_vectors_have_cosine_zero_and_no_gradient(dtype, impl):
    h_s, h_t = torch.zeros(2, 3, dtype=dtype), torch.randn(2, 3)
    h_t[1] = 0
    loss, grad = value_and_grads(functional.hidden_cosine, [h_s], h_t, impl=impl)
    assert loss == 1
    assert not grad.any()


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_the_cosine_of_nan_is_nan(impl):
    """Taken for a vector without a direction, it would train on as if nothing had happened."""
    h_s, h_t = torch.randn(3, 4), torch.randn(3, 4)
    h_s[1, 2] = torch.nan
    loss, grad = value_and_grads(functional.hidden_cosine, [h_s], h_t, impl=impl)
    assert loss.isnan()
    assert functional.hidden_cosine(h_s, h_t, impl=impl).isnan()
    assert grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_cosine_of_tiny_vectors_is_pytorchs(impl):
    h_s, h_t = 1e-7 * torch.randn(4, 3), 1e-7 * torch.randn(4, 3)
    got = value_and_grads(functional.hidden_cosine, [h_s], h_t, impl=impl)
    want = value_and_grads(lambda x, y: (1 - cosine_similarity(x, y)).mean(), [h_s], h_t)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_vectors_too_small_to_have_a_direction(impl):
    """Their norm counts as a constant: its derivative would be thousands of times the gradient."""
    if impl == "triton":
        pytest.importorskip("triton")
    h_s, h_t = 1e-8 * states(3, 6, seed=0), states(3, 6, seed=1)
    want = value_and_grads(functional.hidden_cosine, [h_s.double()], h_t.double(), impl="eager")
    got = value_and_grads(functional.hidden_cosine, [h_s], h_t, impl=impl)
    for x, y in zip(got, want, strict=True):
        assert relative(x, y) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_student_and_fp32_teacher(dtype, poisoned):
    h_s, h_t = states(2, 9, 6, seed=0, dtype=dtype), states(2, 9, 6, seed=1)
    for loss in (functional.hidden_mse, functional.hidden_cosine):
        exact = value_and_grads(loss, [h_s.double()], h_t.double(), impl="eager")
        eager = value_and_grads(loss, [h_s], h_t, impl="eager")
        actual = value_and_grads(loss, [h_s], h_t, impl="chunked")
        assert actual[1].dtype == dtype
        for got, same, want in zip(actual, eager, exact, strict=True):
            assert relative(got, want) <= 2 * relative(same, want) + 1e-6


def test_gradcheck_in_float64():
    h_s, h_t = states(2, 3, 4, seed=0).double(), states(2, 3, 5, seed=1).double()
    weight, bias = states(5, 4, seed=2).double(), states(5, seed=3).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    leaves = [x.requires_grad_() for x in (h_s, weight, bias)]
    check_grad = torch.autograd.gradcheck
    assert check_grad(
        lambda h, w, b: functional.hidden_mse(h, h_t, mask, weight=w, bias=b, impl="chunked"),
        leaves,
    )
    other = states(2, 3, 4, seed=4).double()
    assert check_grad(
        lambda h: functional.hidden_mse([h, 2 * h], [other, other], mask, impl="chunked"), [h_s]
    )
    assert check_grad(lambda h: functional.hidden_cosine(h, other, mask, impl="chunked"), [h_s])
    combine = states(8, 10, seed=5).double().requires_grad_()
    assert check_grad(
        lambda h, w: functional.hidden_combine_mse(
            [h, h * h], [h_t, h_t], w, mask=mask, impl="chunked"
        ),
        [h_s, combine],
    )


def test_equal_states_give_exactly_zero():
    h = states(2, 3, 4, seed=0)
    assert all((x == 0).all() for x in value_and_grads(functional.hidden_mse, [h], h))


@pytest.mark.parametrize("loss", [functional.hidden_mse, functional.hidden_cosine])
def test_symbolic_sizes_stay_symbolic(loss):
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    # One graph for the first sizes, one for any; without gradients, as in evaluation.
    with torch._dynamo.config.patch(recompile_limit=3):
        for batch, length in zip(range(2, 9), range(9, 72, 9), strict=True):
            h_s, h_t = states(batch, length, 6, seed=0), states(batch, length, 6, seed=1)
            mask = ragged_mask(batch, length, seed=2)
            torch.testing.assert_close(compiled(h_s, h_t, mask), loss(h_s, h_t, mask))


def test_arguments_that_do_not_fit_are_named():
    h_s, h_t, weight = states(2, 5, 6, seed=0), states(2, 5, 4, seed=1), states(4, 6, seed=2)
    for bias in (states(1, seed=3), states(6, seed=3), states(2, 5, 4, seed=3)):
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
            functional.hidden_mse(h_s, h_t, weight=weight, bias=bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        functional.hidden_combine_mse([h_t], [h_s], weight, states(1, seed=3))
    with pytest.raises(ValueError, match="one state per call, got 2"):
        functional.hidden_cosine([h_s, h_s], [h_s, h_s])
    with pytest.raises(TypeError, match="row_weight must be a tensor, got float"):
        functional.hidden_mse(h_s, h_s, row_weight=0.5)


@pytest.mark.parametrize("impl", ["eager", "chunked", "auto"])
def test_gradients_of_weights_in_half_precision_are_finite(impl):
    # Summed over the rows, before the mean's division, they would leave the range of float16.
    h_s, h_t = states(4096, 16, seed=0), 40 * states(4096, 8, seed=1)
    weight, bias = 4 * states(8, 16, seed=2), 4 * states(8, seed=3)

    def grads(dtype):
        trained = [x.detach().to(dtype).requires_grad_() for x in (weight, bias)]
        loss = functional.hidden_mse(
            h_s.to(dtype), h_t.to(dtype), weight=trained[0], bias=trained[1], impl=impl
        )
        return torch.autograd.grad(loss, trained)

    for got, want in zip(grads(torch.float16), grads(torch.float32), strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-2)


def test_the_module_of_combine_owns_the_projection_of_all_teacher_states():
    loss = modules.HiddenCombineMSE([3, 3], [4, 5], bias=True)
    h_s = [states(2, 6, 3, seed=i) for i in range(2)]
    h_t = [states(2, 6, width, seed=width) for width in (4, 5)]
    target = loss.projection(torch.cat([x.float() for x in h_t], -1))
    want = torch.nn.functional.mse_loss(torch.cat([x.float() for x in h_s], -1), target)
    torch.testing.assert_close(loss([x.float() for x in h_s], [x.float() for x in h_t]), want)
