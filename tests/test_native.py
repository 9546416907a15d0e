"""The native attention kernels against the float64 reference, on every instruction set this machine has."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, LOW, assert_close, extra_memory, machine, needs_native
from oracle import relative

from bertkd import functional
from bertkd.ops import native

pytestmark = needs_native

LOSSES = {
    "attention_kl": functional.attention_kl,
    "attention_mse": functional.attention_mse,
    "value_relation_kl": functional.value_relation_kl,
}
RAW = {
    "relation_kl": native.relation_kl_fwd_bwd,
    "self_relation_kl": native.self_relation_kl_fwd_bwd,
    "attention_mse": native.attention_mse_fwd_bwd,
}


def run(name, student, teacher, *args, **options):
    """Value and gradients of a loss; value relations take one tensor a side."""
    if name == "value_relation_kl":
        student, teacher = student[:1], teacher[:1]
    return value_and_grads(LOSSES[name], student, *teacher, *args, **options)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    isa=st.sampled_from(ISAS or ["none"]),
    threads=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    widths=st.tuples(st.integers(1, 128), st.one_of(st.none(), st.integers(1, 128))),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, *LOW])] * 2),
    masked=st.booleans(),
    count_pads=st.booleans(),
    weighted=st.sampled_from(["none", "rows", "sequences"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_native_equals_reference(
    name, isa, threads, batch, heads, length, widths, dtypes, masked, count_pads, weighted,
    reduction, seed,
):  # fmt: skip
    student = qkv(batch, heads, length, widths[0], seed=seed, dtype=dtypes[0])
    teacher = qkv(batch, heads, length, widths[1] or widths[0], seed=seed + 1, dtype=dtypes[1])
    mask = ragged_mask(batch, length, seed=seed, empty_row=seed % 3 == 0) if masked else None
    shape = {"none": None, "rows": (batch, length), "sequences": (batch,)}[weighted]
    # Weights of exactly 0 leave rows out, anywhere.
    weight = None if shape is None else (torch.rand(shape) - 0.2).clamp_min(0.0)
    options = {"count_pads": count_pads, "row_weight": weight, "reduction": reduction}
    double = [[x.double() for x in side] for side in (student, teacher)]
    expected = run(name, *double, mask, impl="eager", **options)
    with machine(isa, threads):
        actual = run(name, student, teacher, mask, impl="native", **options)
    rows = batch * heads * length if reduction == "sum" else (heads * length) ** 0.5
    if dtypes[0] == torch.float32:
        assert_close(actual, expected, rows)
    else:
        assert_close(actual[:1], expected[:1], rows)
        rounding = 1e-3 if dtypes[0] == torch.float16 else 8e-3
        for got, want in zip(actual[1:], expected[1:], strict=True):
            # A gradient below fp16's smallest normal number keeps only its absolute precision.
            floor = 2e-6 * rows + 3e-8 * want.numel() ** 0.5
            assert (got.double() - want).norm() <= rounding * want.norm() + floor


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_low_precision_inputs_err_no_more_than_eager(name, dtype, isa):
    student = qkv(2, 3, 50, 16, seed=0, dtype=dtype)
    teacher = qkv(2, 3, 50, 16, seed=1)
    mask = ragged_mask(2, 50, seed=3)
    exact_inputs = [[x.double() for x in side] for side in (student, teacher)]
    exact = run(name, *exact_inputs, mask, impl="eager")
    eager = run(name, student, teacher, mask, impl="eager")
    with machine(isa):
        actual = run(name, student, teacher, mask, impl="native")
    assert actual[0].dtype == torch.float32
    for got, same, want in zip(actual, eager, exact, strict=True):
        assert got.dtype == same.dtype
        assert relative(got, want) <= 2 * relative(same, want) + 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fully_masked_rows_are_zero_with_zero_gradient(name, reduction, isa, poisoned):
    student, teacher = qkv(2, 2, 40, 4, seed=0), qkv(2, 2, 40, 4, seed=1)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    with machine(isa):
        for result in run(name, student, teacher, mask, reduction=reduction, impl="native"):
            assert (result == 0).all()
        mask[0] = True
        loss, *grads = run(name, student, teacher, mask, reduction=reduction, impl="native")
    assert torch.isfinite(loss).all()
    for grad in grads:
        assert (grad[0] != 0).any()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_pads_are_not_read_and_get_zero(name, threads, isa, poisoned):
    student, teacher = qkv(1, 2, 200, 12, seed=0), qkv(1, 2, 200, 12, seed=1)
    mask = (torch.rand(1, 200, generator=torch.Generator().manual_seed(0)) > 0.3).long()
    keep = mask[0].bool()
    short = [[x[:, :, keep] for x in side] for side in (student, teacher)]
    for side in (student, teacher):
        for x in side:
            x[:, :, ~keep] = float("nan")
    with machine(isa, threads):
        expected = run(name, *short, impl="native")
        actual = run(name, student, teacher, mask, impl="native")
    torch.testing.assert_close(actual[0], expected[0])
    for got, want in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(got[:, :, keep], want)
        assert (got[:, :, ~keep] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_huge_scores_make_no_nan(dtype, isa):
    student = qkv(1, 2, 40, 4, seed=0, dtype=dtype, spread=50.0)
    teacher = qkv(1, 2, 40, 4, seed=1, dtype=dtype, spread=50.0)
    double = [[x.double() for x in side] for side in (student, teacher)]
    options = {"scale_s": 1.0, "scale_t": -1.0}
    for name in ("attention_kl", "value_relation_kl"):
        with machine(isa):
            actual = run(name, student, teacher, impl="native", **options)
        expected = run(name, *double, impl="eager", **options)
        # Scores of 1e4 are known to 1e-3 in fp32, and so is e to their power.
        for got, want in zip(actual, expected, strict=True):
            assert relative(got, want) < 1e-2


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_shows_in_the_loss_and_in_the_gradients(isa):
    student, teacher = qkv(1, 1, 20, 4, seed=0), qkv(1, 1, 20, 4, seed=1)
    student[1][0, 0, 3, 2] = float("nan")
    with machine(isa):
        for name in ("attention_kl", "attention_mse"):
            loss, *grads = run(name, student, teacher, impl="native")
            assert loss.isnan()
            assert all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("length", [33, 150])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_equal_networks_give_exactly_zero(name, masked, length, dtype, isa):
    student = qkv(3, 2, length, 8, seed=0, dtype=dtype)
    mask = ragged_mask(3, length, seed=1) if masked else None
    with machine(isa, 2):
        for result in run(name, student, student, mask, impl="native"):
            assert (result == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", sorted(RAW))
def test_a_run_is_repeated_bit_by_bit(op, threads, isa):
    # One head for two threads: its rows are split and their sums are added in order.
    student, teacher = qkv(1, 1, 400, 24, seed=0), qkv(1, 1, 400, 24, seed=1)
    count = 1 if op == "self_relation_kl" else 2
    args = (torch.rand(1, 1, 400), *student[:count], *teacher[:count], None, 0.2, 0.3)
    with machine(isa, threads):
        first = RAW[op](*args)
        for _ in range(5):
            for got, want in zip(RAW[op](*args), first, strict=True):
                assert torch.equal(got, want)


def test_threads_that_share_one_head_agree_with_one_thread():
    student, teacher = qkv(1, 1, 400, 24, seed=0), qkv(1, 1, 400, 24, seed=1)
    for name in LOSSES:
        results = []
        for threads in (1, 2, 3):
            with machine(ISAS[0], threads):
                results.append(run(name, student, teacher, impl="native"))
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                assert relative(got, want) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "cut"), [(1, True), (3, False)])
def test_gram_matrices_are_shared_only_by_threads_with_nothing_else_to_do(heads, cut, isa):
    """To share a head costs half of it again; its sums come out in the order of one thread where it is not shared."""
    tensors = [*qkv(1, heads, 1000, 32, seed=0), *qkv(1, heads, 1000, 32, seed=1)]
    weight = torch.ones(1, heads, 1000)
    results = []
    for threads in (1, 2):
        with machine(isa, threads):
            results.append(native.attention_mse_fwd_bwd(weight, *tensors, None, 0.2, 0.2))
    assert torch.equal(results[0][2], results[1][2]) != cut


SHORT = """
import torch
from bertkd import functional
from bertkd.ops.native.library import kernels

def rows(length):
    torch.manual_seed(0)
    return functional.attention_kl(*torch.randn(4, 2, 3, length, 40), reduction="none", impl="native")

usual = rows(16), rows(17)
for isa in ("avx2", "avx512"):
    kernels().select_cpu_isa(isa)
    print(*[torch.equal(one, rows(len(one[0, 0]))) for one in usual])
"""


@pytest.mark.skipif("avx512" not in ISAS, reason="no AVX-512 here")
def test_short_sequences_are_left_to_avx2_unless_an_instruction_set_is_named():
    environment = {name: x for name, x in os.environ.items() if name != "BERTKD_CPU_ISA"}
    run = [sys.executable, "-c", SHORT]
    child = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["True", "False", "False", "True"]


def test_gradients_are_laid_out_like_the_tensors():
    q, k = qkv(2, 3, 17, 8, seed=0)
    teacher = qkv(2, 3, 17, 8, seed=1)
    weight = torch.ones(()).expand(2, 3, 17)
    # q as a slice of a wider projection, k with the width not last in memory.
    wide = torch.randn(2, 17, 3, 24)
    sliced = wide[..., 8:16].transpose(1, 2)
    odd = torch.randn(2, 3, 8, 17).transpose(2, 3)
    for a, b in ((q, k), (sliced, k), (q, odd), (odd, sliced)):
        loss, *grads = native.relation_kl_fwd_bwd(weight, a, b, *teacher, None, 0.3, 0.3)
        plain = native.relation_kl_fwd_bwd(
            weight.contiguous(), a.contiguous(), b.contiguous(), *teacher, None, 0.3, 0.3
        )
        assert loss == plain[0]
        for grad, want, like in zip(grads, plain[1:], (a, b), strict=True):
            assert grad.stride() == torch.empty_like(like).stride()
            assert torch.equal(grad, want)


def test_empty_batches_and_weights_of_zero():
    for op, function in RAW.items():
        count = 1 if op == "self_relation_kl" else 2
        tensors = [torch.randn(0, 2, 5, 4)] * 2 * count
        loss, *grads = function(torch.empty(0, 2, 5), *tensors, None, 1.0, 1.0)
        assert loss == 0
        assert all(g.shape == (0, 2, 5, 4) for g in grads)
        tensors = [torch.randn(2, 2, 50, 4)] * count + [torch.randn(2, 2, 50, 4)] * count
        for result in function(torch.zeros(2, 2, 50), *tensors, None, 1.0, 1.0):
            assert (result == 0).all()


STEP = """
from bertkd import functional

def step(*tensors):
    functional.attention_kl(*tensors, impl="native").backward()
"""


def test_memory_at_length_4096_is_under_2_percent_of_eager():
    extra, one_map = extra_memory(STEP), 12 * 4096 * 4096 * 4
    # Eager holds at least four maps: tests/test_memory.py measures that.
    assert extra < 0.02 * 4 * one_map, f"{extra / 2**20:.0f} MiB"
