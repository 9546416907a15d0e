"""The native kernels of windows against the float64 reference, on every instruction set this machine has."""

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, LOW, assert_close, machine, needs_native
from oracle import relative

from bertkd import functional
from bertkd.ops import native
from bertkd.ops.dispatch import resolve

pytestmark = needs_native

LOSSES = {"relation_kl": functional.relation_kl, "attention_mse": functional.attention_mse}
ROWS = {op: getattr(native, f"window_{op}_rows") for op in LOSSES}
BACKWARD = {op: getattr(native, f"window_{op}_fwd_bwd") for op in LOSSES}


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from(sorted(LOSSES)),
    isa=st.sampled_from(ISAS or ["none"]),
    threads=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    window=st.one_of(st.integers(0, 20), st.integers(0, 150)),
    widths=st.tuples(st.integers(1, 70), st.one_of(st.none(), st.integers(1, 70))),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, *LOW])] * 2),
    masked=st.booleans(),
    count_pads=st.booleans(),
    kept=st.sampled_from([1.0, 0.7, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_native_equals_reference(
    op, isa, threads, batch, heads, length, window, widths, dtypes, masked, count_pads, kept,
    reduction, seed,
):  # fmt: skip
    student = qkv(batch, heads, length, widths[0], seed=seed, dtype=dtypes[0])
    teacher = qkv(batch, heads, length, widths[1] or widths[0], seed=seed + 1, dtype=dtypes[1])
    mask = ragged_mask(batch, length, seed=seed, empty_row=seed % 3 == 0) if masked else None
    # Weights of exactly 0 leave rows out, anywhere: a block's rows may lie far apart.
    weight = (torch.rand(batch, length) + kept - 1).clamp_min(0) if kept < 1 else None
    options = {"count_pads": count_pads, "row_weight": weight, "reduction": reduction}
    double = [[x.double() for x in side] for side in (student, teacher)]
    options |= {"mask": mask, "window": window}
    expected = value_and_grads(LOSSES[op], double[0], *double[1], impl="eager", **options)
    with machine(isa, threads):
        actual = value_and_grads(LOSSES[op], student, *teacher, impl="native", **options)
    rows = batch * heads * length if reduction == "sum" else (heads * length) ** 0.5
    if dtypes[0] == torch.float32:
        assert_close(actual, expected, rows)
        return
    assert_close(actual[:1], expected[:1], rows)
    rounding = 1e-3 if dtypes[0] == torch.float16 else 8e-3
    for got, want in zip(actual[1:], expected[1:], strict=True):
        # A gradient below fp16's smallest normal number keeps only its absolute precision.
        floor = 2e-6 * rows + 3e-8 * want.numel() ** 0.5
        assert (got.double() - want).norm() <= rounding * want.norm() + floor


@pytest.mark.parametrize("op", sorted(LOSSES))
def test_auto_takes_the_native_kernel(op):
    assert resolve(f"window_{op}", "auto", qkv(1, 1, 9, 4, seed=0)).impl == "native"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", sorted(LOSSES))
def test_a_row_without_keys_is_zero_with_zero_gradient(op, isa, poisoned):
    student, teacher = qkv(1, 2, 300, 12, seed=0), qkv(1, 2, 300, 12, seed=1)
    mask = torch.zeros(1, 300, dtype=torch.bool)
    mask[:, :40] = mask[:, 150] = True
    at = torch.arange(300)
    near = ((at[:, None] - at).abs() <= 5) & mask[0]
    seen, counted = near.any(1), (near.any(0) & mask[0])
    with machine(isa):
        rows = ROWS[op](*student, *teacher, mask, 0.3, 0.2, 5)
        _, *grads = BACKWARD[op](torch.ones(1, 2, 300), *student, *teacher, mask, 0.3, 0.2, 5)
    assert torch.isfinite(rows).all()
    assert (rows[:, :, ~seen] == 0).all()
    for grad, reached in zip(grads, (seen, counted), strict=True):
        assert torch.isfinite(grad).all()
        assert (grad[:, :, ~reached] == 0).all()
    # The softmax over one key is 1 on both sides.
    assert (rows[0, :, 150] > 0).all() == (op == "attention_mse")
    assert (rows[0, :, :44] > 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", sorted(LOSSES))
def test_keys_far_outside_of_the_window_are_not_visited(op, threads, isa):
    """A product with their 0 would turn NaN into NaN."""
    tensors = [*qkv(1, 1, 600, 24, seed=0), *qkv(1, 1, 600, 24, seed=1)]
    weight = torch.zeros(1, 1, 600)
    weight[..., 300:330] = weight[..., 590:] = 1.0
    args = (None, 0.2, 0.3, 16)
    with machine(isa, threads):
        expected = BACKWARD[op](weight, *tensors, *args)
        for keys in tensors[1::2]:
            keys[:, :, :200] = keys[:, :, 430:500] = float("nan")
        for got, want in zip(BACKWARD[op](weight, *tensors, *args), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", sorted(LOSSES))
def test_no_key_outside_of_the_window_has_a_gradient(op, isa):
    """Not even the 2^-100 at which exponentials stay."""
    tensors = [*qkv(1, 1, 100, 8, seed=0), *qkv(1, 1, 100, 8, seed=1)]
    weight = torch.zeros(1, 1, 100)
    weight[..., 47:53] = 1.0
    with machine(isa):
        _, grad_a, grad_b = BACKWARD[op](weight, *tensors, None, 1.0, 1.0, 4)
    for grad, first, last in ((grad_a, 47, 53), (grad_b, 43, 57)):
        inside = torch.zeros(100, dtype=torch.bool)
        inside[first:last] = True
        assert ((grad[0, 0] != 0).any(-1) == inside).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", sorted(LOSSES))
@pytest.mark.parametrize("window", [0, 9])
def test_equal_networks_give_exactly_zero(op, window, isa):
    student, mask = qkv(3, 2, 150, 8, seed=0), ragged_mask(3, 150, seed=1)
    with machine(isa, 2):
        options = {"impl": "native", "window": window}
        for result in value_and_grads(LOSSES[op], student, *student, mask, **options):
            assert (result == 0).all()


@pytest.mark.parametrize("op", sorted(LOSSES))
def test_threads_that_share_one_head_agree_with_one_thread(op):
    tensors = [*qkv(1, 1, 900, 24, seed=0), *qkv(1, 1, 900, 24, seed=1)]
    results = []
    for threads in (1, 2, 3, 3):
        with machine(ISAS[0], threads):
            weight = torch.linspace(0, 1, 900).expand(1, 1, -1)
            results.append(BACKWARD[op](weight, *tensors, None, 0.2, 0.3, 40))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert relative(got, want) < 1e-6
    for got, want in zip(results[3], results[2], strict=True):
        assert torch.equal(got, want)
