"""Triton kernels of softmax_kl and linear_kl, in the interpreter, against float64 eager."""

import pytest
import torch
from attention_cases import value_and_grads
from triton_judge import break_kernel, check, fails, randn, weights

pytest.importorskip("triton")

from bertkd import functional
from bertkd.kernels import softmax_kl as kernels
from bertkd.ops.schema import OPS
from bertkd.ops.triton import linear_kl as linear_launcher
from bertkd.ops.triton import softmax_kl as launcher

HALF, FULL = torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FULL, HALF], ids=["fp32", "fp16"])
FORMS = pytest.mark.parametrize("form", ["block", "loop"])


@pytest.fixture
def use(monkeypatch):
    """Makes one form of the kernel run whatever the number of classes."""

    def choose(form):
        monkeypatch.setattr(launcher, "BLOCK_CLASSES", 0 if form == "loop" else 1 << 20)
        # Blocks of 512 logits, so that small rows have several, and an edge.
        monkeypatch.setattr(launcher, "LOOP_WARPS", {2: 1, 4: 1})
        monkeypatch.setattr(launcher, "LOOP_COLS", 512)

    return choose


@DTYPES
@FORMS
@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 1), (3, 3), (7, 64), (4, 512), (2, 1301), (1, 3000)]
)
def test_equals_reference(rows, classes, form, dtype, use, poisoned):
    use(form)
    z_s, z_t = (2 * randn(2, rows, classes, seed=i, dtype=dtype) for i in range(2))
    mask = weights(2, rows, seed=3) > 0
    options = {"mask": mask, "row_weight": weights(2, rows, seed=4), "temperature": 2.0}
    check(functional.softmax_kl, [z_s], z_t, **options)
    check(functional.softmax_kl, [z_s], z_t, reduction="none")


@FORMS
def test_mixed_dtypes_and_strided_rows(form, use, poisoned):
    use(form)
    z_s, z_t = randn(6, 4, 600, seed=0, dtype=HALF)[:, 1], randn(600, 6, seed=1).T
    check(functional.softmax_kl, [z_s], z_t, row_weight=weights(6, seed=4))
    check(functional.softmax_kl, [z_t], z_s, row_weight=weights(6, seed=4))


@FORMS
def test_bfloat16(form, use, poisoned):
    use(form)
    z_s, z_t = (randn(4, 600, seed=i, dtype=torch.bfloat16) for i in range(2))
    check(functional.softmax_kl, [z_s], z_t, row_weight=weights(4, seed=4))


@FORMS
def test_value_alone(form, use):
    use(form)
    z_s, z_t = randn(4, 700, seed=0), randn(4, 700, seed=1)
    exact = functional.softmax_kl(z_s.double(), z_t.double(), reduction="none", impl="eager")
    rows = functional.softmax_kl(z_s, z_t, reduction="none", impl="triton")
    torch.testing.assert_close(rows, exact.float())


@DTYPES
@FORMS
def test_equal_sides_give_exactly_zero(form, dtype, use):
    use(form)
    z = 5 * randn(4, 700, seed=0, dtype=dtype)
    results = value_and_grads(functional.softmax_kl, [z], z, impl="triton", temperature=3.0)
    assert all((x == 0).all() for x in results)


@FORMS
def test_near_equal_sides_keep_their_digits(form, use):
    use(form)
    z = 5 * randn(3, 700, seed=0)
    near = z + 1e-2 * randn(3, 700, seed=1) + 50.0
    exact = functional.softmax_kl(near.double(), z.double(), impl="eager")
    loss = functional.softmax_kl(near, z, impl="triton")
    # KL is 3e-5 next to logits of 50, whose own spacing in fp32 is 4e-6.
    assert abs(loss - exact) < 2.5e-7


@FORMS
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_and_a_shift(scale, form, use):
    use(form)
    z_s, z_t = scale * randn(3, 700, seed=0), scale * randn(3, 700, seed=1)
    assert all(
        torch.isfinite(x).all()
        for x in value_and_grads(functional.softmax_kl, [z_s], z_t, impl="triton")
    )
    z_s, z_t = randn(3, 700, seed=0).half(), randn(3, 700, seed=1).half()
    z_s[:, 5], z_t[:, 600] = 65504.0, -65504.0
    check(functional.softmax_kl, [z_s], z_t)


@FORMS
def test_rows_of_weight_zero_are_not_read(form, use, poisoned):
    use(form)
    z_s, z_t = randn(3, 700, seed=0), randn(3, 700, seed=1)
    z_s[1], z_t[1] = float("nan"), float("inf")
    row_weight = torch.tensor([1.0, 0.0, 2.0])
    loss, grad = OPS["softmax_kl_fwd_bwd"](row_weight, z_s, z_t, 1.0, "triton")
    assert torch.isfinite(loss)
    assert (grad[1] == 0).all()


def linear(h_s, w_s, *rest, **options):
    *bias_s, h_t, w_t, bias_t = rest
    bias = bias_s[0] if bias_s else None
    return functional.linear_kl(h_s, w_s, h_t, w_t, bias_s=bias, bias_t=bias_t, **options)


def frozen(w_s, bias_s):
    """``linear`` of states alone, as a decoder that is not trained leaves it."""

    def loss(h_s, *teacher, **options):
        return linear(h_s, *(x.to(h_s.dtype) for x in (w_s, bias_s)), *teacher, **options)

    return loss


def decoders(rows, d_s, d_t, vocabulary, dtype):
    shapes = [
        (rows, d_s),
        (vocabulary, d_s),
        (vocabulary,),
        (rows, d_t),
        (vocabulary, d_t),
        (vocabulary,),
    ]
    return [randn(*s, seed=i, dtype=dtype) * s[-1] ** -0.5 for i, s in enumerate(shapes)]


@pytest.fixture(params=["all rows", "kept rows"])
def compaction(request, monkeypatch):
    """Both ways of treating rows of weight 0: on a GPU the size of the problem decides."""
    if request.param == "all rows":
        monkeypatch.setattr(linear_launcher, "_kept", lambda *args: None)


@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 33), (40, 101), (5, 1500)])
def test_linear_equals_reference(rows, vocabulary, dtype, compaction, use, monkeypatch, poisoned):
    use("loop" if vocabulary > 1000 else "block")
    monkeypatch.setattr(linear_launcher, "MIN_ROWS", max(2, rows // 3))
    monkeypatch.setattr(linear_launcher, "CHUNK", 1)
    tensors = decoders(rows, 24, 17, vocabulary, dtype)
    options = {"row_weight": weights(rows, seed=9) if rows > 1 else None, "temperature": 0.5}
    check(linear, tensors[:3], *tensors[3:], **options)
    check(linear, tensors[:2], *tensors[3:], **options)
    check(linear, tensors[:3], *tensors[3:], reduction="none")
    check(frozen(*tensors[1:3]), tensors[:1], *tensors[3:], **options)


def test_linear_of_mixed_dtypes(compaction, poisoned):
    half, full = decoders(9, 24, 24, 101, HALF), decoders(9, 24, 24, 101, FULL)
    mixed = [half[0], full[1], full[2], half[3], half[4], full[5]]
    check(linear, mixed[:3], *mixed[3:], row_weight=weights(9, seed=9))


def test_linear_without_any_row(compaction, poisoned):
    for dtype in (FULL, HALF):
        tensors = decoders(5, 8, 8, 50, dtype)
        none = torch.zeros(5, dtype=torch.bool)
        results = value_and_grads(linear, tensors[:3], *tensors[3:], mask=none, impl="triton")
        assert all((x == 0).all() for x in results)


@pytest.mark.parametrize(
    ("factor", "temperature"), [(1e-8, 1.0), (65536.0, 1.0), (-65536.0, 1.0), (10.0, 0.02)]
)
def test_weights_do_not_leave_the_range_of_half_precision(factor, temperature, compaction):
    tensors = decoders(9, 24, 24, 1000, HALF)
    h_s, w_s, bias_s, h_t, w_t, bias_t = tensors
    one = torch.ones(9)
    args = (h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, True)
    wide = (x.float() for x in args[:6])
    big = OPS["linear_kl_fwd_bwd"](one * factor, *wide, temperature, True, "chunked")
    got = OPS["linear_kl_fwd_bwd"](one * factor, *args, "triton")
    for x, y in zip(got, big, strict=True):
        if y.abs().max() < 6e4:
            torch.testing.assert_close(
                x.float(), y, rtol=2e-2, atol=float(y.abs().max()) * 2e-3 + 3e-8
            )


def test_no_rows():
    none, weight, bias = torch.empty(0, 20), randn(30, 20, seed=2), randn(30, seed=3)
    results = [*OPS["softmax_kl_fwd_bwd"](torch.ones(0), none, none, 1.0, "triton")]
    linear_args = (none, weight, bias, none, weight, bias, 1.0, True)
    results += OPS["linear_kl_fwd_bwd"](torch.ones(0), *linear_args, "triton")
    assert all((x == 0).all() for x in results)
    assert OPS["linear_kl_rows"](*linear_args, None, "triton").shape == (0,)


def compare_loop():
    z_s, z_t = 3 * randn(5, 700, seed=0), 3 * randn(5, 700, seed=1)
    check(functional.softmax_kl, [z_s], z_t, row_weight=weights(5, seed=4), temperature=2.0)


BROKEN = {
    "student's sum not rescaled": ("l_s * tl.exp2((m_s - new_s) * scale), ", "l_s, "),
    "origin of the sum not moved": ("((m_t - new_t) - (m_s - new_s)) * l_t", "0.0 * l_t"),
    "tail of a row left out of the sums": (
        "        if full < classes:\n            s = _block(z_s, bias_s, full, lanes, classes, WRAPS, STEP, True)\n"
        "            t = _block(z_t, bias_t, full, lanes, classes, WRAPS, STEP, True)\n            m_s",
        "        if full < 0:\n            s = _block(z_s, bias_s, full, lanes, classes, WRAPS, STEP, True)\n"
        "            t = _block(z_t, bias_t, full, lanes, classes, WRAPS, STEP, True)\n            m_s",
    ),
    "pads of the tail counted": ("x = tl.where(mask, x, LOW)", "x = x"),
    "gradient without the temperature": ("tl.div_rn(w * inverse_t, sum_t)", "tl.div_rn(w, sum_t)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_kernels_fail_the_comparison(fault, use, monkeypatch, tmp_path):
    use("loop")
    compare_loop()
    break_kernel(monkeypatch, tmp_path, kernels, launcher, *BROKEN[fault])
    fails(compare_loop)
