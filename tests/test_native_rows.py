"""The native row ops (softmax_kl, hidden_mse, linear_kl) against float64, on every instruction set of this machine."""

import pytest
import torch
from attention_cases import value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, LOW, assert_close, machine, needs_native
from oracle import relative
from torch.utils._python_dispatch import TorchDispatchMode

from bertkd import functional, reference
from bertkd.ops import native
from bertkd.ops.native import linear_kl
from bertkd.ops.schema import _counted_rows

pytestmark = needs_native


def pair(rows, width, *, seed, dtypes=(torch.float32, torch.float32), spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, width, generator=generator) * spread).to(dtype) for dtype in dtypes]


@settings(max_examples=80, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    threads=st.sampled_from([1, 2]),
    rows=st.integers(1, 40),
    classes=st.one_of(st.integers(1, 130), st.integers(1, 5000)),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, *LOW])] * 2),
    masked=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_softmax_kl_equals_reference(
    isa, threads, rows, classes, dtypes, masked, reduction, temperature, seed
):
    z_s, z_t = pair(rows, classes, seed=seed, dtypes=dtypes)
    mask = (torch.arange(rows) % 3 != 1).long() if masked else None
    options = {"temperature": temperature, "reduction": reduction, "t_squared": True}
    expected = value_and_grads(
        functional.softmax_kl, [z_s.double()], z_t.double(), mask, impl="eager", **options
    )
    with machine(isa, threads):
        actual = value_and_grads(functional.softmax_kl, [z_s], z_t, mask, impl="native", **options)
    assert actual[1].dtype == dtypes[0]
    assert_close(actual[:1], expected[:1], rows * temperature**2)
    if dtypes[0] == torch.float32:
        assert_close(actual[1:], expected[1:], temperature)
    else:
        rounding = 1e-3 if dtypes[0] == torch.float16 else 8e-3
        floor = 2e-6 + 3e-8 * expected[1].numel() ** 0.5
        error = (actual[1].double() - expected[1]).norm()
        assert error <= (rounding * expected[1].norm() + floor) * max(1.0, temperature)


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    threads=st.sampled_from([1, 2]),
    states=st.integers(1, 3),
    rows=st.integers(1, 100),
    width=st.one_of(st.integers(1, 40), st.integers(500, 1100)),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, *LOW])] * 2),
    seed=st.integers(0, 99),
)
def test_hidden_mse_equals_reference(isa, threads, states, rows, width, dtypes, seed):
    sides = list(
        zip(*(pair(rows, width, seed=seed + k, dtypes=dtypes) for k in range(states)), strict=True)
    )
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) - 0.2
    double = [[x.double().requires_grad_() for x in side] for side in sides]
    loss = sum(
        (reference.hidden_mse_rows(s, t) * weight.double()).sum()
        for s, t in zip(*double, strict=True)
    )
    expected = [loss.detach(), *torch.autograd.grad(loss, double[0])]
    with machine(isa, threads):
        value, grads = native.hidden_mse_fwd_bwd(weight, *map(list, sides))
        alone = native.hidden_mse_sum(weight, *map(list, sides))
    assert torch.equal(alone, value)
    # The terms may cancel, so the error is relative to their sum of sizes.
    size = sum((s - t).square().sum() for s, t in zip(*double, strict=True)).item()
    assert abs(value.item() - expected[0].item()) <= 1e-6 * size
    for got, want in zip(grads, expected[1:], strict=True):
        assert got.dtype == dtypes[0]
        rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtypes[0]]
        assert relative(got, want) <= rounding


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.integers(1, 40),
    block=st.integers(1, 40),
    classes=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, *LOW]),
    biased=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_linear_kl_equals_reference(
    isa, rows, block, classes, dtype, biased, masked, reduction, temperature, seed
):
    h_s, w_s = (pair(n, 7, seed=seed, spread=1.0, dtypes=(dtype,))[0] for n in (rows, classes))
    h_t, w_t = (pair(n, 5, seed=seed + 1, spread=1.0)[0] for n in (rows, classes))
    bias_s, bias_t = (x[0] for x in pair(1, classes, seed=seed + 2)) if biased else (None, None)
    mask = (torch.arange(rows) % 3 != 1).long() if masked else None
    options = {"temperature": temperature, "reduction": reduction}

    def loss(impl, double):
        def run(h, w, *bias):
            cast = (lambda x: None if x is None else x.double()) if double else (lambda x: x)
            return functional.linear_kl(
                h, w, cast(h_t), cast(w_t), mask, bias_s=bias[0] if bias else None,
                bias_t=cast(bias_t), impl=impl, **options,
            )  # fmt: skip

        leaves = [h_s, w_s, *([bias_s] if biased else [])]
        return value_and_grads(run, [x.double() if double else x for x in leaves])

    expected = loss("eager", True)
    with pytest.MonkeyPatch.context() as patch, machine(isa, 2):
        patch.setattr(linear_kl, "LEAST_ROWS", block)
        patch.setattr(linear_kl, "MOST_ROWS", block)
        actual = loss("native", False)
    assert_close(actual[:1], expected[:1], rows)
    for got, want, like in zip(actual[1:], expected[1:], (h_s, w_s, bias_s), strict=False):
        assert got.dtype == like.dtype
        rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[got.dtype]
        assert (got.double() - want).norm() <= rounding * want.norm() + 1e-6 * rows


@pytest.mark.parametrize("isa", ISAS)
def test_linear_kl_projects_only_rows_that_count(isa, poisoned):
    (h_s, h_t), (w_s, w_t) = pair(6, 8, seed=0), pair(50, 8, seed=1)
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0])
    plain = native.linear_kl_fwd_bwd(weight, h_s, w_s, None, h_t, w_t, None, 1.0, True)
    h_s[1], h_t[3] = float("nan"), float("inf")
    with machine(isa):
        spoiled = native.linear_kl_fwd_bwd(weight, h_s, w_s, None, h_t, w_t, None, 1.0, True)
        none = native.linear_kl_fwd_bwd(weight * 0, h_s, w_s, None, h_t, w_t, None, 1.0, True)
    for got, want in zip(spoiled, plain, strict=True):
        torch.testing.assert_close(got, want)
    assert all((x == 0).all() for x in none)


class Copies(TorchDispatchMode):
    """Counts what copies rows out of a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.index.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("left_out", "copied"), [(0, False), (1, True)])
def test_linear_kl_copies_no_states_where_every_row_counts(left_out, copied):
    (h_s, h_t), (w_s, w_t) = pair(6, 8, seed=0), pair(3, 8, seed=1)
    weight = (torch.arange(6) >= left_out).float()
    decoders = w_s, None, h_t, w_t, None, 1.0, True
    with Copies() as counted:
        native.linear_kl_fwd_bwd(weight, h_s, *decoders)
    assert bool(counted.count) == copied
    with Copies() as counted:
        _counted_rows(native.linear_kl_rows, weight, h_s, *decoders)
    assert bool(counted.count) == copied


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_kl_makes_no_gradient_of_a_frozen_decoder(isa, biased):
    (h_s, h_t), (w_s, w_t) = pair(6, 8, seed=0), pair(50, 8, seed=1)
    (bias, _) = pair(1, 50, seed=2)
    args = torch.rand(6), h_s, w_s, bias[0] if biased else None, h_t, w_t, None, 1.0
    with machine(isa):
        loss, grad_h, *_ = native.linear_kl_fwd_bwd(*args, True)
        alone = native.linear_kl_fwd_bwd(*args, False)
    assert torch.equal(alone[0], loss)
    assert torch.equal(alone[1], grad_h)
    assert [x.numel() for x in alone[2:]] == [0, 0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("classes", [1, 7, 64, 1000, 30522])
def test_equal_logits_and_states_give_exactly_zero(classes, dtype, isa, poisoned):
    (z,) = pair(4, classes, seed=0, dtypes=(dtype,))
    weight = torch.rand(4)
    with machine(isa):
        for result in native.softmax_kl_fwd_bwd(weight, z, z.clone(), 2.0):
            assert (result == 0).all()
        assert (native.softmax_kl_rows(z, z.clone(), 2.0) == 0).all()
        loss, (grad,) = native.hidden_mse_fwd_bwd(weight, [z], [z.clone()])
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_huge_logits_make_no_nan_and_a_common_shift_nothing(dtype, isa):
    z_s, z_t = pair(6, 500, seed=0, dtypes=(dtype, torch.float32), spread=1e4)
    expected = reference.softmax_kl_rows(z_s.double(), z_t.double())
    with machine(isa):
        rows = native.softmax_kl_rows(z_s, z_t, 1.0)
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=0)
        _, grad = native.softmax_kl_fwd_bwd(torch.ones(6), z_s, z_t, 1.0)
        assert torch.isfinite(grad).all()
        z_s, z_t = pair(6, 500, seed=0)
        plain = native.softmax_kl_rows(z_s, z_t, 1.0)
        shifted = native.softmax_kl_rows(z_s, z_t + 1024.0, 1.0)
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_logit_may_stand_anywhere(isa):
    """Also behind the last whole vector: an exponential relative to a smaller one would not be one."""
    z_s, z_t = pair(37, 37, seed=0)
    z_s.fill_diagonal_(400.0)
    z_t.fill_diagonal_(300.0)
    expected = reference.softmax_kl_rows(z_s.double(), z_t.double())
    gradient = torch.softmax(z_s.double(), -1) - torch.softmax(z_t.double(), -1)
    with machine(isa):
        rows = native.softmax_kl_rows(z_s, z_t, 1.0)
        _, grad = native.softmax_kl_fwd_bwd(torch.ones(37), z_s, z_t, 1.0)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e9, 1e10, 1e30, 3e37])
def test_logits_whose_rounding_is_larger_than_an_exponent(size, isa):
    """Those of a model that has diverged: the value has to say so, and the gradient to lead back."""
    z_s, z_t = (x / x.abs().max() * size for x in pair(6, 500, seed=0))
    rows = torch.ones(6)
    truth = reference.softmax_kl_rows(z_s.double(), z_t.double())
    gradient = torch.softmax(z_s.double(), -1) - torch.softmax(z_t.double(), -1)
    with machine(isa):
        loss, grad = native.softmax_kl_fwd_bwd(rows, z_s, z_t, 1.0)
    torch.testing.assert_close(loss.double(), truth.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LOW)
def test_gradients_are_rounded_as_pytorch_rounds(dtype, isa):
    """To nearest even: every number of the dtype, what lies between two, and a hair above and below that."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    bits = torch.arange(largest, dtype=torch.int16)
    exact, following = (x.view(dtype).double() for x in (bits, bits + 1))
    middle = ((exact + following) / 2).float()
    hairs = [torch.nextafter(middle, torch.tensor(to)) for to in (float("inf"), 0.0)]
    # The widest NaN, whose bits have no room to be rounded up.
    odd = torch.tensor([0x7F800000, 0x7F7FFFFF, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    values = torch.cat([exact.float(), middle, *hairs, odd.view(torch.float32)])
    values = torch.cat([values, -values])
    # Rows that end behind a whole vector: what is left is rounded one by one.
    values = values[: values.numel() // 37 * 37].view(-1, 37)
    with machine(isa):
        half = torch.full((values.shape[0],), 0.5)
        nothing = torch.zeros_like(values, dtype=dtype)
        _, (grad,) = native.hidden_mse_fwd_bwd(half, [nothing], [-values])
    torch.testing.assert_close(grad, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_weight_are_not_read(isa, poisoned):
    z_s, z_t = pair(5, 100, seed=0)
    z_s[2] = float("nan")
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    with machine(isa):
        loss, grad = native.softmax_kl_fwd_bwd(weight, z_s, z_t, 1.0)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
        assert (grad[2] == 0).all()
        # A NaN that counts is seen.
        assert native.softmax_kl_rows(z_s, z_t, 1.0)[2].isnan()


def test_strided_rows_and_expanded_weights():
    wide_s, wide_t = pair(6, 300, seed=0)
    weight = torch.tensor(0.7).expand(6)
    z_s, z_t = wide_s[:, 40:170], wide_t[::2, ::2][:, :130].repeat(2, 1)
    plain = native.softmax_kl_fwd_bwd(weight.contiguous(), z_s.contiguous(), z_t, 1.5)
    for got, want in zip(native.softmax_kl_fwd_bwd(weight, z_s, z_t, 1.5), plain, strict=True):
        assert torch.equal(got, want)
    column = torch.randn(130, 6).T
    loss, grad = native.softmax_kl_fwd_bwd(weight, column, z_t, 1.5)
    assert grad.stride() == column.stride()
    want = native.softmax_kl_fwd_bwd(weight, column.contiguous(), z_t, 1.5)
    assert loss == want[0]
    assert torch.equal(grad, want[1])


@pytest.mark.parametrize("isa", ISAS)
def test_a_run_is_repeated_bit_by_bit(isa):
    z_s, z_t = pair(300, 1000, seed=0)
    weight = torch.rand(300)
    with machine(isa, 2):
        first = native.softmax_kl_fwd_bwd(weight, z_s, z_t, 1.0)
        state, (grad,) = native.hidden_mse_fwd_bwd(weight, [z_s], [z_t])
        for _ in range(5):
            again = native.softmax_kl_fwd_bwd(weight, z_s, z_t, 1.0)
            assert torch.equal(again[0], first[0])
            assert torch.equal(again[1], first[1])
            loss, (g,) = native.hidden_mse_fwd_bwd(weight, [z_s], [z_t])
            assert torch.equal(loss, state)
            assert torch.equal(g, grad)


def test_no_rows_and_no_states():
    loss, grad = native.softmax_kl_fwd_bwd(torch.empty(0), *[torch.empty(0, 5)] * 2, 1.0)
    assert loss == 0
    assert grad.shape == (0, 5)
    assert native.softmax_kl_rows(*[torch.empty(0, 5)] * 2, 1.0).shape == (0,)
    assert (
        native.hidden_mse_fwd_bwd(torch.empty(0), [torch.empty(0, 5)], [torch.empty(0, 5)])[0] == 0
    )
    assert native.hidden_mse_fwd_bwd(torch.ones(3), [], []) == (torch.zeros(()), [])
    assert native.hidden_mse_sum(torch.ones(3), [], []) == 0
