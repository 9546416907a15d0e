"""The Triton kernels of attention_mse, Gram matrices and tiles, against the float64 reference, interpreted."""

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads

from bertkd import functional, reference

pytest.importorskip("triton")
from triton_cases import broken, weighted, worst

from bertkd.ops import triton as ops
from bertkd.ops.triton import attention_mse

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU test_gpu.py runs these kernels"
)
SCALES = (0.3, 0.2)


@pytest.fixture(params=["gram", "tiles"])
def form(request, monkeypatch):
    """Both ways to compute it."""
    monkeypatch.setattr(attention_mse, "gram_pays", lambda *_: request.param == "gram")
    return request.param


def compare(student, teacher, mask=None, weight=None, scales=SCALES):
    """Rows, loss and gradients of a pair of sides; see ``worst``."""
    batch, heads, length, _ = student[0].shape
    if weight is None:
        weight = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(7)) * 1e-2
        weight = weight if mask is None else weight * mask[:, None]
    args = (*student, *teacher, mask, *scales)
    actual = [ops.attention_mse_rows(*args), *ops.attention_mse_fwd_bwd(weight, *args)]
    exact, eager = (
        weighted(reference.attention_mse_rows, weight, student, teacher, mask, scales, dtype)
        for dtype in (torch.float64, None)
    )
    return worst(actual, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "batch", "masked", "widths"),
    [(1, 2, False, (16, 16)), (17, 4, True, (16, 24)), (64, 1, False, (40, 40)), (127, 1, True, (16, 16))],
)  # fmt: skip
def test_equals_the_reference(form, dtype, length, batch, masked, widths, poisoned):
    student = qkv(batch, 1, length, widths[0], seed=0, dtype=dtype)
    teacher = qkv(batch, 1, length, widths[1], seed=1, dtype=dtype)
    mask = ragged_mask(batch, length, seed=2, empty_row=batch > 2).bool() if masked else None
    assert compare(student, teacher, mask) <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_sequences(form, dtype, poisoned):
    student, teacher = (qkv(1, 1, 200, 16, seed=seed, dtype=dtype) for seed in (0, 1))
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[:, 160:] = False
    assert compare(student, teacher, mask) <= 0


def test_rows_of_pads_may_have_weight(form, poisoned):
    student, teacher = qkv(3, 2, 20, 16, seed=0), qkv(3, 2, 20, 16, seed=1)
    weight = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    assert compare(student, teacher, ragged_mask(3, 20, seed=3).bool(), weight) <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_networks_give_exactly_zero(form, dtype):
    student = qkv(2, 1, 40, 16, seed=0, dtype=dtype)
    mask = ragged_mask(2, 40, seed=1).bool()
    args = (*student, *student, mask, 0.3, 0.3)
    results = [
        ops.attention_mse_rows(*args),
        *ops.attention_mse_fwd_bwd(torch.ones(2, 1, 40), *args),
    ]
    assert all((x == 0).all() for x in results)


def test_stays_accurate_near_convergence(form):
    """A student that differs by 1e-4 makes a loss of 1e-8: a Gram form that cancels would lose it."""
    teacher = qkv(1, 1, 70, 16, seed=0)
    student = [x + 1e-4 * n for x, n in zip(teacher, qkv(1, 1, 70, 16, seed=1), strict=True)]
    weight = torch.ones(1, 1, 70)
    actual = ops.attention_mse_fwd_bwd(weight, *student, *teacher, None, 0.25, 0.25)
    exact = weighted(
        reference.attention_mse_rows, weight, student, teacher, None, (0.25, 0.25), torch.float64
    )
    for got, want in zip(actual, exact[1:], strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


def test_empty_sequences_are_zero(form, poisoned):
    student, teacher = qkv(2, 2, 12, 16, seed=0), qkv(2, 2, 12, 16, seed=1)
    args = (*student, *teacher, torch.zeros(2, 12, dtype=torch.bool), *SCALES)
    results = [
        ops.attention_mse_rows(*args),
        *ops.attention_mse_fwd_bwd(torch.ones(2, 2, 12), *args),
    ]
    assert all((x == 0).all() for x in results)
    nothing = [x[:0] for x in (*student, *teacher)]
    loss, *_ = ops.attention_mse_fwd_bwd(torch.ones(0, 2, 12), *nothing, None, *SCALES)
    assert loss == 0


def test_strides_dtypes_and_factors(form, poisoned):
    fused = torch.randn(1, 20, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    student = [x.view(1, 20, 2, 16).transpose(1, 2) for x in fused.chunk(3, -1)[:2]]
    teacher = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv(1, 2, 20, 16, seed=1)]
    assert compare(student, [x.half() for x in teacher]) <= 0
    assert compare([x.half() for x in teacher], student, scales=(-0.3, 0.2)) <= 0
    assert compare([x.bfloat16() for x in student], teacher, scales=(0.3, 0.0)) <= 0
    assert compare(student, teacher, scales=(0.0, 0.2)) <= 0


def test_large_scores_do_not_overflow_in_float16(form):
    """Scores of 6e5 and their differences do not fit in float16; the gradient here does."""
    student = qkv(1, 1, 20, 16, seed=0, dtype=torch.float16, spread=200.0)
    teacher = qkv(1, 1, 20, 16, seed=1, dtype=torch.float16, spread=200.0)
    assert compare(student, teacher, weight=torch.full((1, 1, 20), 1e-6), scales=(1.0, 1.0)) <= 0


def test_many_positions_are_split_between_programs(monkeypatch, poisoned):
    monkeypatch.setattr(attention_mse, "gram_pays", lambda *_: True)
    student, teacher = qkv(1, 1, 301, 16, seed=0), qkv(1, 1, 301, 16, seed=1)
    assert compare(student, teacher) <= 0


def test_public_loss_runs_on_it(monkeypatch):
    student, teacher = qkv(2, 1, 20, 4, seed=0), qkv(2, 1, 20, 4, seed=1)
    monkeypatch.setattr(attention_mse, "GRAM_LENGTH", 2)
    assert attention_mse.gram_pays(20, 4, 4)
    mask = ragged_mask(2, 20, seed=0)
    for reduction in ("mean", "none"):
        want, got = (
            value_and_grads(
                functional.attention_mse, student, *teacher, mask, impl=impl, reduction=reduction
            )
            for impl in ("chunked", "triton")
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


MUTATIONS = {
    "gram": {
        "weight left out": ("left = left * w[:, None]", "left = left"),
        "pads let through": ("s, t = tl.where(real, s, 0.0), tl.where(real, t, 0.0)", "pass"),
        "one half forgotten": ("            first += mixed\n", ""),
    },
    "tiles": {
        "pads let through": ("difference * counts[None, :], 0.0)", "difference, difference)"),
        "factor forgotten": ("(mine * (2.0 * scale_s))", "(mine * 2.0)"),
        "teacher's factor forgotten": ("difference = (s - t * ratio)", "difference = (s - t)"),
    },
}  # fmt: skip
KERNELS = [name for name in vars(attention_mse) if name.endswith("_kernel")]


@pytest.mark.parametrize(
    ("which", "mutation"), [(which, name) for which in MUTATIONS for name in MUTATIONS[which]]
)
def test_a_broken_kernel_is_noticed(which, mutation, monkeypatch, tmp_path):
    monkeypatch.setattr(attention_mse, "gram_pays", lambda *_: which == "gram")
    module = broken(tmp_path, "attention_mse", *MUTATIONS[which][mutation])
    for kernel in KERNELS:
        monkeypatch.setattr(attention_mse, kernel, getattr(module, kernel))
    student, teacher = qkv(2, 1, 40, 16, seed=0), qkv(2, 1, 40, 16, seed=1)
    mask = ragged_mask(2, 40, seed=1).bool()
    assert compare(student, teacher, mask, torch.rand(2, 1, 40)) > 0.01
