"""Triton kernels of the hidden-state losses, in the interpreter, against float64 eager."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import ragged_mask, value_and_grads
from triton_judge import break_kernel, check, fails, randn, weights

pytest.importorskip("triton")

from bertkd import functional
from bertkd.kernels import hidden_cosine as cosine_kernels
from bertkd.kernels import hidden_mse as mse_kernels
from bertkd.kernels import hidden_proj_mse as proj_kernels
from bertkd.ops.schema import OPS
from bertkd.ops.tensors import laid_out_like
from bertkd.ops.triton import hidden_mse as mse_launcher
from bertkd.ops.triton import hidden_proj_mse as proj_launcher
from bertkd.ops.triton import states

ROOT = Path(__file__).parent.parent

HALF, FULL = torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FULL, HALF], ids=["fp32", "fp16"])
SIZES = pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 17), (33, 64), (33, 300), (7, 640)])


def several(*tensors, impl, **options):
    """hidden_mse of the first half of the tensors against the second."""
    half = len(tensors) // 2
    return functional.hidden_mse(tensors[:half], tensors[half:], impl=impl, **options)


def projected(h_s, weight, *rest, **options):
    *bias, h_t = rest
    return functional.hidden_mse(h_s, h_t, weight=weight, bias=bias[0] if bias else None, **options)


def combined(first, second, weight, bias, *teachers, **options):
    return functional.hidden_combine_mse([first, second], teachers, weight, bias, **options)


@DTYPES
@SIZES
def test_states(rows, width, dtype, poisoned):
    students = [randn(2, rows, width, seed=i, dtype=dtype) for i in range(3)]
    teachers = [randn(2, rows, width, seed=9 + i, dtype=dtype) for i in range(3)]
    mask = ragged_mask(2, rows, seed=3, empty_row=True)
    check(several, students, *teachers, mask=mask, row_weight=weights(2, rows, seed=4))


def test_bfloat16(poisoned):
    def states(*shape):
        return [randn(*shape, seed=i, dtype=torch.bfloat16) for i in range(2)]

    h_s, h_t = states(9, 40)
    check(several, [h_s], h_t)
    check(functional.hidden_cosine, [h_s], h_t)
    check(projected, [h_s, states(40, 40)[1], states(40)[0]], h_t)
    check(combined, [h_s, h_s, states(80, 40)[1], states(80)[0]], h_t)


@pytest.mark.parametrize("most", [2, 32])
def test_states_of_several_dtypes_and_layouts_and_launches(most, monkeypatch, poisoned):
    monkeypatch.setattr(states, "TENSORS_PER_LAUNCH", most)
    whole = randn(6, 4, 20, seed=0)
    students = [whole[:, i] for i in range(3)]  # rows of a longer tensor
    students += [randn(20, 6, seed=1, dtype=HALF).T, randn(1, 20, seed=2).expand(6, 20)]
    teachers = [randn(6, 20, seed=5 + i, dtype=HALF if i % 2 else FULL) for i in range(5)]
    check(several, students, *teachers, row_weight=weights(6, seed=4))


@DTYPES
@SIZES
def test_cosine(rows, width, dtype, poisoned):
    h_s, h_t = (randn(2, rows, width, seed=i, dtype=dtype) for i in range(2))
    mask = ragged_mask(2, rows, seed=3)
    check(functional.hidden_cosine, [h_s], h_t, mask=mask, row_weight=weights(2, rows, seed=4))


@pytest.mark.parametrize("width", [1030, 3000])
def test_cosine_of_rows_that_do_not_fit(width, monkeypatch, poisoned):
    monkeypatch.setattr(mse_launcher, "WHOLE_WIDTH", 1024)
    h_s, h_t = randn(5, width, seed=0), randn(5, width, seed=1, dtype=HALF)
    check(functional.hidden_cosine, [h_s], h_t, row_weight=weights(5, seed=4))


@pytest.mark.parametrize("width", [3, 2049])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cosine_of_zero_vectors(dtype, width):
    h_s, h_t = torch.zeros(2, width, dtype=dtype), torch.randn(2, width)
    h_t[1] = 0
    loss, grad = value_and_grads(functional.hidden_cosine, [h_s], h_t, impl="triton")
    assert loss == 1
    assert not grad.any()


@pytest.mark.parametrize("width", [4, 2049])
def test_the_cosine_of_nan_is_nan(width):
    h_s, h_t = torch.randn(3, width), torch.randn(3, width)
    h_s[1, 2] = torch.nan
    loss, grad = value_and_grads(functional.hidden_cosine, [h_s], h_t, impl="triton")
    assert loss.isnan()
    assert functional.hidden_cosine(h_s, h_t, impl="triton").isnan()
    assert grad.isnan().any(1).tolist() == [False, True, False]


def test_cosine_of_tiny_vectors():
    h_s, h_t = 1e-7 * torch.randn(4, 3), 1e-7 * torch.randn(4, 3)
    check(functional.hidden_cosine, [h_s], h_t)


@DTYPES
@pytest.mark.parametrize(("rows", "d_s", "d_t"), [(1, 17, 1), (33, 64, 17), (70, 100, 130)])
def test_projection(rows, d_s, d_t, dtype, poisoned):
    h_s, weight, bias = (
        randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(2, rows, d_s), (d_t, d_s), (d_t,)])
    )
    h_t = randn(2, rows, d_t, seed=5, dtype=dtype)
    mask = ragged_mask(2, rows, seed=3)
    check(projected, [h_s, weight, bias], h_t, mask=mask, row_weight=weights(2, rows, seed=4))
    # An upstream gradient may be negative.
    check(projected, [h_s, weight], h_t, row_weight=-weights(2, rows, seed=4))


def test_projection_of_mixed_dtypes_and_strided_rows(poisoned):
    h_s, h_t = randn(9, 3, 24, seed=0, dtype=HALF)[:, 0], randn(9, 2, 40, seed=1)[:, 1]
    check(projected, [h_s, randn(40, 24, seed=2), randn(40, seed=3, dtype=HALF)], h_t)
    check(projected, [h_s.float(), randn(24, 40, seed=2).T, randn(80, seed=3)[::2]], h_t.half())


@DTYPES
def test_projection_is_right_with_the_tiles_of_many_rows(dtype, monkeypatch, poisoned):
    config = proj_launcher.proj_config(1 << 20, 64, dtype, 8)
    monkeypatch.setattr(proj_launcher, "proj_config", lambda *args: config)
    tensors = [randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(150, 64), (136, 64), (136,)])]
    check(projected, tensors, randn(150, 136, seed=5, dtype=dtype), row_weight=weights(150, seed=4))


@DTYPES
def test_combine(dtype, poisoned):
    shapes = [(2, 9, 20), (2, 9, 20), (40, 51), (40,)]
    student = [randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    teachers = [randn(2, 9, 17, seed=6 + i, dtype=dtype) for i in range(3)]
    mask = ragged_mask(2, 9, seed=3)
    check(combined, student, *teachers, mask=mask, row_weight=weights(2, 9, seed=4))


@pytest.mark.parametrize("dtypes", [[HALF, FULL, HALF, FULL], [FULL, FULL, HALF, HALF]])
def test_combine_of_mixed_dtypes(dtypes, poisoned):
    shapes = [(7, 20), (7, 20), (40, 34), (40,)]
    student = [
        randn(*s, seed=i, dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    teachers = [randn(7, 17, seed=6, dtype=HALF), randn(7, 17, seed=7, dtype=dtypes[3])]
    check(combined, student, *teachers)


def test_combine_of_strided_states(poisoned):
    def states(width, seed):
        return [randn(7, 3, width, seed=seed)[:, 1], randn(7, width, seed=seed + 1)]

    student = [*states(20, 0), randn(40, 34, seed=2), randn(40, seed=3)]
    check(combined, student, *states(17, 4))


def test_combine_refuses_states_of_different_widths():
    student = [randn(7, 20, seed=0), randn(7, 12, seed=1), randn(32, 34, seed=2), randn(32, seed=3)]
    teachers = [randn(7, 17, seed=i) for i in range(2)]
    with pytest.raises(ValueError, match="one width a side"):
        combined(*student, *teachers, impl="triton")


def test_rows_of_weight_zero_are_not_read():
    row_weight = torch.tensor([1.0, 0.0, 0.5])
    nan = torch.tensor([[0.0], [float("nan")], [0.0]])
    h_s, h_t, weight = (
        randn(3, 20, seed=0) + nan,
        randn(3, 20, seed=1) + nan,
        randn(20, 20, seed=2),
    )
    loss, (grad,) = OPS["hidden_mse_fwd_bwd"](row_weight, [h_s], [h_t], "triton")
    cosine, cosine_grad = OPS["hidden_cosine_fwd_bwd"](row_weight, h_s, h_t, "triton")
    projected, *_ = OPS["hidden_proj_mse_fwd_bwd"](row_weight, h_s, weight, None, h_t, "triton")
    assert torch.isfinite(torch.stack([loss, cosine, projected])).all()
    assert (grad[1] == 0).all()
    assert (cosine_grad[1] == 0).all()


@DTYPES
def test_equal_states_give_exactly_zero(dtype):
    h = randn(5, 300, seed=0, dtype=dtype)
    for loss in (functional.hidden_mse, functional.hidden_cosine):
        assert all((x == 0).all() for x in value_and_grads(loss, [h], h, impl="triton"))
    identity = torch.eye(300, dtype=dtype)
    assert all((x == 0).all() for x in value_and_grads(projected, [h, identity], h, impl="triton"))


def test_gradients_are_laid_out_like_their_tensors():
    h, wide, weight = randn(20, 6, seed=0).T, randn(6, 40, seed=1)[:, ::2], randn(20, 20, seed=2).T
    one = torch.ones(6)
    loss = OPS["hidden_mse_fwd_bwd"](one, [h, wide], [wide, h], "triton")
    grads = [*loss[1], OPS["hidden_cosine_fwd_bwd"](one, h, wide, "triton")[1]]
    grads += OPS["hidden_proj_mse_fwd_bwd"](one, h, weight, None, wide, "triton")[1:3]
    for grad, x in zip(grads, [h, wide, h, h, weight], strict=True):
        assert grad.stride() == torch.empty_like(x).stride()


def test_a_gradient_is_not_copied_for_the_gaps_of_a_slice():
    fused = randn(2, 20, 96, seed=0)
    part = fused[..., :32].view(2, 20, 2, 16).transpose(1, 2)
    written = torch.empty_like(part)
    assert laid_out_like(part, written) is written
    assert laid_out_like(part, written.half()).dtype == torch.float32
    assert laid_out_like(part, written.contiguous()).stride() == written.stride()


@pytest.mark.parametrize(("setting", "answer"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_precision_after_torch_s_newer_settings_were_used(setting, answer):
    """In a process of its own: PyTorch then refuses to answer the old question for good."""
    program = f"""
import torch
from bertkd.ops.triton.hidden_proj_mse import precision
torch.backends.cuda.matmul.fp32_precision = {setting!r}
print(precision(torch.float32), precision(torch.float16))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [answer, "ieee"], done.stderr


def test_no_rows():
    none, weight, bias = torch.empty(0, 20), randn(20, 20, seed=2), randn(20, seed=3)
    one = torch.ones(0)
    results = [*OPS["hidden_mse_fwd_bwd"](one, [none], [none], "triton")]
    results += OPS["hidden_cosine_fwd_bwd"](one, none, none, "triton")
    results += OPS["hidden_proj_mse_fwd_bwd"](one, none, weight, bias, none, "triton")
    results += OPS["hidden_combine_mse_fwd_bwd"](one, [none], weight, bias, [none], "triton")
    flat = [x for r in results for x in (r if isinstance(r, list) else [r])]
    assert all((x == 0).all() for x in flat)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e8])
def test_large_and_small_states(scale):
    h_s, h_t = randn(4, 64, seed=0) * scale, randn(4, 64, seed=1) * scale
    for loss in (functional.hidden_mse, functional.hidden_cosine):
        check(loss, [h_s], h_t)


def test_the_same_bits_every_time():
    tensors = [randn(70, 48, seed=0), randn(33, 48, seed=1), randn(33, seed=2)]
    h_t = randn(70, 33, seed=3)
    first = value_and_grads(projected, tensors, h_t, impl="triton")
    for got, want in zip(
        value_and_grads(projected, tensors, h_t, impl="triton"), first, strict=True
    ):
        assert torch.equal(got, want)


def compare_states():
    states = [randn(9, 20, seed=i) for i in range(4)]
    check(several, states[:2], *states[2:], row_weight=weights(9, seed=4))


def compare_cosine():
    check(functional.hidden_cosine, [randn(9, 20, seed=0)], randn(9, 20, seed=1))


def compare_projection():
    tensors = [randn(70, 33, seed=0), randn(20, 33, seed=1), randn(20, seed=2)]
    check(projected, tensors, randn(70, 20, seed=3), row_weight=weights(70, seed=4))


STATES = (mse_kernels, mse_launcher, compare_states)
COSINE = (cosine_kernels, mse_launcher, compare_cosine)
PROJECTION = (proj_kernels, proj_launcher, compare_projection)
BROKEN = {
    "gradient without its factor": (*STATES, "(2.0 * w)", "w"),
    "loss without weights": (*STATES, "tl.sum(squares, 1) * w", "tl.sum(squares, 1)"),
    "first state for all": (*STATES, "select(students, state)", "students[0]"),
    "gradient along the state": (*COSINE, "along = tl.div_rn(xy,", "along = tl.div_rn(0.0 * xy,"),
    "last of the depth left out": (*PROJECTION, "< k_width - k", "< k_width - k - 1"),
    "bias left out": (*PROJECTION, "if bias is not None", "if False"),
    "loss alone without its bias": (*PROJECTION, "if bias is not None", "if outputs is not None"),
    "bias gradient of pads": (*PROJECTION, "tl.sum(weighted, 0)", "tl.sum(residual, 0)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_kernels_fail_the_comparison(fault, monkeypatch, tmp_path):
    kernels, launcher, compare, old, new = BROKEN[fault]
    compare()
    break_kernel(monkeypatch, tmp_path, kernels, launcher, old, new)
    fails(compare)
