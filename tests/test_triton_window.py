"""The Triton kernels where rows compare a window of keys, against the float64 reference, interpreted."""

import importlib
from functools import partial

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads

from bertkd import functional, reference

pytest.importorskip("triton")
from triton_cases import broken, weighted, worst

from bertkd.ops import triton as ops
from bertkd.ops.triton import attention_mse, config, relation_kl

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU test_triton_gpu.py runs these kernels"
)
SCALES = (0.3, 0.2)


@pytest.fixture(params=["relation_kl", "attention_mse"])
def op(request):
    return request.param


def run(op, weight, *args):
    """The rows, their weighted sum and both gradients."""
    rows, fwd_bwd = (getattr(ops, f"window_{op}_{form}") for form in ("rows", "fwd_bwd"))
    return [rows(*args), *fwd_bwd(weight, *args)]


def compare(op, student, teacher, window, mask=None, weight=None, scales=SCALES):
    """Rows, loss and gradients of a pair of sides; see ``worst``."""
    batch, heads, length, _ = student[0].shape
    if weight is None:
        weight = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(7)) * 1e-2
        weight = weight if mask is None else weight * mask[:, None]
    actual = run(op, weight, *student, *teacher, mask, *scales, window)
    rows = partial(getattr(reference, f"{op}_rows"), window=window)
    exact, eager = (
        weighted(rows, weight, student, teacher, mask, scales, dtype)
        for dtype in (torch.float64, None)
    )
    return worst(actual, eager, exact)


def sides(batch, length, widths=(16, 16), dtype=torch.float32, heads=1):
    return [qkv(batch, heads, length, widths[seed], seed=seed, dtype=dtype) for seed in (0, 1)]


def real(length, *spans):
    """(1, length), true inside the spans."""
    mask = torch.zeros(1, length, dtype=torch.bool)
    for first, end in spans:
        mask[:, first:end] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "batch", "masked", "widths", "window"),
    [
        (1, 2, False, (16, 16), 0),
        (17, 4, True, (16, 24), 1),
        (64, 1, False, (32, 12), 16),
        (64, 1, False, (16, 16), 150),
        (127, 3, True, (16, 16), 0),
        (127, 1, False, (40, 16), 64),
        (200, 1, True, (16, 16), 64),
        (200, 1, False, (16, 16), 150),
        (200, 3, True, (16, 16), 16),
    ],
)
def test_equals_the_reference(op, dtype, length, batch, masked, widths, window, poisoned):
    mask = ragged_mask(batch, length, seed=2, empty_row=batch > 2).bool() if masked else None
    assert compare(op, *sides(batch, length, widths, dtype), window, mask) <= 0


@pytest.mark.parametrize("tile", [(64, 32), (16, 64)])
def test_windows_that_end_inside_tiles(op, tile, monkeypatch, poisoned):
    monkeypatch.setattr(config, "INTERPRETED", config.Config(*tile, 4, 1))
    for mask in (None, real(90, (9, 50), (53, 81))):
        assert compare(op, *sides(1, 90), 21, mask) <= 0


@pytest.mark.parametrize(
    "spans", [[(0, 20)], [(80, 100)], [(0, 8), (92, 100)], [(45, 46)], []], ids=str
)
def test_rows_without_keys_are_exactly_zero(op, spans, poisoned):
    """Pad rows that count: alone in a block of rows, and beside rows that have keys."""
    window, mask = 5, real(100, *spans)
    weight = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0))
    student, teacher = sides(1, 100)
    assert compare(op, student, teacher, window, mask, weight) <= 0
    rows, _, grad_a, _ = run(op, weight, *student, *teacher, mask, *SCALES, window)
    reached = reference.attended_keys(mask, window, 100, mask.device).any(-1)[0, 0]
    assert reached.any() == bool(spans)
    assert not reached.all()
    assert (rows[0, 0, ~reached] == 0).all()
    assert (grad_a[0, 0, ~reached] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tiles_outside_the_window_are_not_visited(op):
    """Infinity there makes NaN of whatever it meets."""
    (a_s, b_s), (a_t, b_t) = sides(1, 200)
    fwd_bwd = getattr(ops, f"window_{op}_fwd_bwd")

    def results(weight):
        return fwd_bwd(weight, a_s, b_s, a_t, b_t, None, *SCALES, 16)

    some, every = real(200, (64, 96))[:, None].float(), torch.ones(1, 1, 200)
    want, first_keys = results(some), results(every)[2][:, :, :32]
    # Rows 64 to 95 reach keys 48 to 111, and keys 0 to 31 rows 0 to 47.
    b_s[:, :, :32] = b_t[:, :, :32] = b_s[:, :, 128:] = b_t[:, :, 128:] = float("inf")
    for value, same in zip(results(some), want, strict=True):
        assert torch.equal(value, same)
    (a_s, b_s), (a_t, b_t) = sides(1, 200)
    a_s[:, :, 64:] = a_t[:, :, 64:] = float("inf")
    assert torch.equal(results(every)[2][:, :, :32], first_keys)


def test_heads_and_rows_weigh_differently(op, poisoned):
    student, teacher = sides(3, 40, heads=2)
    weight = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    weight[:, :, :3] = 0
    assert compare(op, student, teacher, 4, ragged_mask(3, 40, seed=3).bool(), weight) <= 0


@pytest.mark.parametrize("masked", [False, True])
def test_equal_networks_give_exactly_zero(op, masked):
    student, _ = sides(3, 40, dtype=torch.float16)
    mask = ragged_mask(3, 40, seed=1).bool() if masked else None
    results = run(op, torch.rand(3, 1, 40), *student, *student, mask, 0.25, 0.25, 6)
    assert all((x == 0).all() for x in results)


def test_strides_dtypes_and_factors(op, poisoned):
    fused = torch.randn(1, 40, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    student = [x.view(1, 40, 2, 16).transpose(1, 2) for x in fused.chunk(3, -1)[:2]]
    teacher = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv(1, 2, 40, 24, seed=1)]
    mask = real(40, (2, 30), (33, 36))
    assert compare(op, student, [x.half() for x in teacher], 6, mask) <= 0
    assert compare(op, [x.half() for x in teacher], student, 6, scales=(-0.3, 0.2)) <= 0
    assert compare(op, [x.bfloat16() for x in student], teacher, 6, mask, scales=(0.3, 0.0)) <= 0
    assert compare(op, student, teacher, 6, mask, scales=(0.0, -0.2)) <= 0
    weight, model_shaped = torch.ones(1, 2, 40), qkv(1, 2, 40, 16, seed=1)
    *_, grad_a, grad_b = run(op, weight, *model_shaped, *teacher, mask, *SCALES, 6)
    assert [grad_a.stride(), grad_b.stride()] == [x.stride() for x in model_shaped]


def test_no_sequences_give_nothing(op):
    student, teacher = sides(0, 12)
    rows, loss, grad_a, grad_b = run(op, torch.ones(0, 1, 12), *student, *teacher, None, *SCALES, 3)
    assert loss == 0
    assert rows.shape == (0, 1, 12)
    assert [grad_a.shape, grad_b.shape] == [x.shape for x in student]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count_pads", [False, True])
def test_public_losses_run_on_it(reduction, count_pads):
    student, teacher = sides(3, 40)
    mask = ragged_mask(3, 40, seed=0)
    options = {"reduction": reduction, "count_pads": count_pads, "window": 5}
    for loss in (functional.attention_kl, functional.attention_mse):
        want, got = (
            value_and_grads(loss, student, *teacher, mask, impl=impl, **options)
            for impl in ("chunked", "triton")
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_refuses_what_it_cannot_hold(op):
    wide = torch.zeros(1, 1, 9, 160)
    assert "up to 128, got 160" in ops.refusal(f"window_{op}", [wide] * 4)
    assert ops.refusal(f"window_{op}", [wide[..., :128]] * 4) is None
    with pytest.raises(ValueError, match=rf"triton.*window_{op}.*up to 128"):
        getattr(functional, op)(wide, wide, wide, wide, window=2, impl="triton")


# (file, what stands there, what breaks it)
MUTATIONS = {
    "a key too many": ("primitives", "(2 * window)", "(2 * window + 1)"),
    "pads let through": ("primitives", "arange(0, SIZE), FAR)", "arange(0, SIZE), start)"),
    "a hole taken for keys": ("relation_kl", "if key_dense >= key_end else", "if key_dense >= 0 else"),
    "rows reach too little": ("relation_kl", "row_start + BLOCK_M, window)", "row_start + BLOCK_M, 0)"),
    "keys reach too little": ("relation_kl", "reached_end, window)", "reached_end, 0)"),
    "statistics of nobody": ("relation_kl", "tl.minimum(key_start + BLOCK_N, key_end)", "key_start + BLOCK_N"),
    "rows out of reach": ("relation_kl", "s, t = tl.where(keep, s, LOW), tl.where(keep, t, LOW)", "pass"),
    "pairs out of reach": ("attention_mse", "taken = within(", "within("),
    "pairs reach too little": ("attention_mse", "x_start + BLOCK_M, window)", "x_start + BLOCK_M, 0)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_noticed(mutation, monkeypatch, tmp_path, poisoned):
    file, old, new = MUTATIONS[mutation]
    op, launcher = (
        ("attention_mse", attention_mse)
        if file == "attention_mse"
        else ("relation_kl", relation_kl)
    )
    package = broken(tmp_path, file, old, new).__package__
    for name, kernel in vars(importlib.import_module(f"{package}.{op}")).items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(launcher, name, kernel)
    mask = real(100, (0, 12), (15, 40))
    weight = torch.rand(1, 1, 100, generator=torch.Generator().manual_seed(3))
    assert compare(op, *sides(1, 100), 9, mask, weight) > 0.01
