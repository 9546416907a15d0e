"""The Triton kernels of relation_kl and self_relation_kl against the float64 reference, interpreted."""

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads

from bertkd import functional, reference

pytest.importorskip("triton")
from triton_cases import broken, weighted, worst

from bertkd.ops import triton as ops
from bertkd.ops.triton import attention, config, relation_kl, self_relation_kl

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU test_gpu.py runs these kernels"
)
SCALES = (0.3, 0.2)


@pytest.fixture(params=["general", "short"])
def form(request, monkeypatch):
    """Both ways to compute gradients: any length, or a program that owns a head."""
    monkeypatch.setattr(config, "INTERPRETED_SHORT", 0 if request.param == "general" else 512)
    return request.param


def compare(student, teacher, mask=None, weight=None, scales=SCALES, rows=True):
    """Run rows and gradients of a pair of sides (two tensors each, or one: the self-relation); see ``worst``."""
    batch, heads, length, _ = student[0].shape
    if weight is None:
        weight = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(7)) * 1e-3
        weight = weight if mask is None else weight * mask[:, None]
    op = "relation_kl" if len(student) == 2 else "self_relation_kl"
    args = (*student, *teacher, mask, *scales)
    loss, *grads = getattr(ops, f"{op}_fwd_bwd")(weight, *args)
    actual = [loss, *(g for grad in grads for g in (grad if isinstance(grad, list) else [grad]))]
    exact, eager = (
        weighted(reference.relation_kl_rows, weight, student, teacher, mask, scales, dtype)
        for dtype in (torch.float64, None)
    )
    if not rows:
        return worst(actual, eager[1:], exact[1:])
    return worst([getattr(ops, f"{op}_rows")(*args), *actual], eager, exact)


def mask_of(kind, batch, length):
    if kind is None:
        return None
    if kind == "ragged":
        return ragged_mask(batch, length, seed=length, empty_row=batch > 2).bool()
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "right":
        mask[:, length - length // 4 :] = False
    elif kind == "left":
        mask[:, : length // 3] = False
    else:
        mask[:, length // 5 :: 7] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "batch", "kind", "widths"),
    [
        (1, 2, None, (16, 16)),
        (17, 4, "ragged", (16, 24)),
        (64, 1, None, (32, 12)),
        (127, 1, "holes", (16, 16)),
    ],
)
def test_equals_the_reference(form, dtype, length, batch, kind, widths, poisoned):
    student = qkv(batch, 1, length, widths[0], seed=0, dtype=dtype)
    teacher = qkv(batch, 1, length, widths[1], seed=1, dtype=dtype)
    mask = mask_of(kind, batch, length)
    assert compare(student, teacher, mask) <= 0
    assert compare(student[:1], teacher[:1], mask, rows=False) <= 0


@pytest.mark.parametrize(("kind", "dtype"), [("right", torch.float16), ("left", torch.float32)])
def test_long_sequences_skip_their_pads(kind, dtype, monkeypatch, poisoned):
    monkeypatch.setattr(config, "INTERPRETED", config.Config(64, 32, 4, 1))
    student = qkv(1, 1, 200, 16, seed=0, dtype=dtype)
    teacher = qkv(1, 1, 200, 16, seed=1, dtype=dtype)
    mask = mask_of(kind, 1, 200)
    assert compare(student, teacher, mask) <= 0
    assert compare(student[:1], teacher[:1], mask, rows=False) <= 0


def test_pads_beyond_the_sequence_are_not_read(form):
    student, teacher = qkv(1, 1, 40, 16, seed=0), qkv(1, 1, 40, 16, seed=1)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 20:] = False
    weight = mask[:, None].float()
    expected = ops.relation_kl_fwd_bwd(weight, *student, *teacher, mask, *SCALES)
    for x in (*student, *teacher):
        x[:, :, 20:] = float("inf")
    actual = ops.relation_kl_fwd_bwd(weight, *student, *teacher, mask, *SCALES)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_rows_of_pads_may_have_weight(form, poisoned):
    """count_pads gives pad rows a weight, and an upstream gradient may be negative or differ between heads."""
    student, teacher = qkv(3, 2, 20, 16, seed=0), qkv(3, 2, 20, 16, seed=1)
    mask = ragged_mask(3, 20, seed=3).bool()
    weight = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    weight[:, :, :3] = 0
    assert compare(student, teacher, mask, weight) <= 0
    assert compare(student[:1], teacher[:1], mask, weight, rows=False) <= 0


def test_tiny_weights_do_not_underflow_in_float16(form):
    student = qkv(1, 1, 33, 16, seed=0, dtype=torch.float16)
    teacher = qkv(1, 1, 33, 16, seed=1, dtype=torch.float16)
    weight = torch.full((1, 1, 33), 2.0**-20)
    small = ops.relation_kl_fwd_bwd(weight, *student, *teacher, None, *SCALES)
    large = ops.relation_kl_fwd_bwd(weight * 2**20, *student, *teacher, None, *SCALES)
    for got, want in zip(small[1:], large[1:], strict=True):
        # The gradient itself is rounded to a multiple of float16's smallest step.
        assert (got.double() * 2**20 - want.double()).abs().max() <= 2**20 * 2.0**-25 + 1e-6


def test_the_range_of_float16_is_found_from_weights_of_any_sign_and_head(form):
    student, teacher = (qkv(1, 2, 33, 16, seed=seed, dtype=torch.float16) for seed in (0, 1))
    weight = -torch.rand(1, 2, 33, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 1e-6
    assert compare(student, teacher, weight=weight) <= 0


@pytest.mark.parametrize("masked", [False, True])
def test_equal_networks_give_exactly_zero(form, masked):
    student = qkv(3, 1, 40, 16, seed=0, dtype=torch.float16)
    mask = ragged_mask(3, 40, seed=1).bool() if masked else None
    weight = torch.rand(3, 1, 40)
    args = (mask, 0.25, 0.25)
    results = [
        ops.relation_kl_rows(*student, *student, *args),
        *ops.relation_kl_fwd_bwd(weight, *student, *student, *args),
        *ops.self_relation_kl_fwd_bwd(weight, student[0], student[0], *args),
    ]
    assert all((x == 0).all() for x in results)


def test_empty_sequences_are_zero_with_zero_gradient(form, poisoned):
    student, teacher = qkv(2, 2, 12, 16, seed=0), qkv(2, 2, 12, 16, seed=1)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    weight = torch.ones(2, 2, 12)
    for result in (
        ops.relation_kl_rows(*student, *teacher, mask, *SCALES),
        *ops.relation_kl_fwd_bwd(weight, *student, *teacher, mask, *SCALES),
        *ops.self_relation_kl_fwd_bwd(weight, student[0], teacher[0], mask, *SCALES),
        *ops.relation_kl_fwd_bwd(weight * 0, *student, *teacher, None, *SCALES),
    ):
        assert (result == 0).all()
    nothing = [x[:0] for x in (*student, *teacher)]
    loss, grad_a, _ = ops.relation_kl_fwd_bwd(weight[:0], *nothing, mask[:0], *SCALES)
    assert loss == 0
    assert grad_a.shape == nothing[0].shape


def test_huge_scores_make_no_nan(form):
    student = qkv(1, 1, 40, 16, seed=0, dtype=torch.float16, spread=50.0)
    teacher = qkv(1, 1, 40, 16, seed=1, dtype=torch.float16, spread=50.0)
    weight = torch.ones(1, 1, 40)
    results = ops.relation_kl_fwd_bwd(weight, *student, *teacher, None, 1.0, 1.0)
    assert all(torch.isfinite(x).all() for x in results)


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
def test_stays_accurate_near_convergence(form, noise):
    """The gradient is a difference of near-equals: rounding before the subtraction would show here."""
    teacher = qkv(1, 1, 70, 16, seed=0, dtype=torch.float16)
    student = [
        (x + noise * n).half()
        for x, n in zip(teacher, qkv(1, 1, 70, 16, seed=3, dtype=torch.float16), strict=True)
    ]
    weight = torch.ones(1, 1, 70)
    _, *grads = ops.relation_kl_fwd_bwd(weight, *student, *teacher, None, 0.25, 0.25)
    exact, eager = (
        weighted(reference.relation_kl_rows, weight, student, teacher, None, (0.25, 0.25), dtype)
        for dtype in (torch.float64, None)
    )
    for got, same, want in zip(grads, eager[2:], exact[2:], strict=True):
        assert (got - want).norm() <= 2 * (same - want).norm()


@pytest.mark.parametrize("spreads", [(4.0, 0.2), (0.2, 4.0)])
def test_a_sharp_and_a_flat_side(form, spreads):
    """Sums of the two softmaxes that differ a hundredfold."""
    student, teacher = (
        qkv(1, 1, 70, 16, seed=seed, dtype=torch.float16, spread=spread)
        for seed, spread in enumerate(spreads)
    )
    assert compare(student, teacher) <= 0


def test_strided_inputs_and_gradients_laid_out_like_them(form, poisoned):
    fused = torch.randn(2, 20, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    student = [x.view(2, 20, 2, 16).transpose(1, 2) for x in fused.chunk(3, -1)[:2]]
    # Head components apart from each other, as nobody's model has them.
    teacher = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv(2, 2, 20, 16, seed=1)]
    assert compare(student, teacher) <= 0
    assert compare(teacher, student) <= 0
    weight = torch.ones(2, 2, 20)
    model_shaped = qkv(2, 2, 20, 16, seed=1)
    _, grad, _ = ops.relation_kl_fwd_bwd(weight, *model_shaped, *student, None, *SCALES)
    assert grad.stride() == model_shaped[0].stride()


def test_sides_of_different_dtypes_and_odd_widths(form):
    student = qkv(1, 1, 20, 40, seed=0, dtype=torch.float16)
    teacher = qkv(1, 1, 20, 1, seed=1, dtype=torch.float32)
    assert compare(student, teacher) <= 0
    assert compare([student[0], student[1].float()], teacher) <= 0
    # The interpreter truncates where a GPU rounds to bfloat16; the kernel upcasts what it would multiply wrongly.
    assert compare([x.bfloat16() for x in student], teacher) <= 0


@pytest.mark.parametrize("scales", [(-0.3, 0.2), (0.3, -0.2), (0.0, 0.2), (0.3, 0.0)])
def test_factors_that_are_not_positive(form, scales):
    student, teacher = qkv(1, 1, 20, 16, seed=0), qkv(1, 1, 20, 16, seed=1)
    for mask in (None, mask_of("holes", 1, 20)):
        assert compare(student, teacher, mask, scales=scales) <= 0
        assert compare(student[:1], teacher[:1], mask, scales=scales, rows=False) <= 0


def test_public_losses_run_on_it(monkeypatch):
    """Unequal heads through relation_heads, every reduction, the backward of rows: as chunked computes them."""
    x_s = torch.randn(2, 12, 3 * 8).view(2, 12, 3, 8).transpose(1, 2)
    x_t = torch.randn(2, 12, 6 * 6).view(2, 12, 6, 6).transpose(1, 2)
    mask = ragged_mask(2, 12, seed=0)
    for reduction in ("mean", "sum", "none"):
        for count_pads in (False, True):
            options = {"relation_heads": 2, "reduction": reduction, "count_pads": count_pads}
            for loss, sides in (
                (functional.attention_kl, ([x_s, x_s * 0.5], [x_t, x_t])),
                (functional.value_relation_kl, ([x_s], [x_t])),
            ):
                want, got = (
                    value_and_grads(loss, sides[0], *sides[1], mask, impl=impl, **options)
                    for impl in ("chunked", "triton")
                )
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [33, 65, 97, 129])
def test_no_launch_is_compiled_anew_for_where_a_share_of_the_loss_lies(length, monkeypatch):
    """Triton compiles for pointers to multiples of 16 bytes, and once more for others."""
    starts = []
    inner = relation_kl.keys_launch
    monkeypatch.setattr(
        relation_kl,
        "keys_launch",
        lambda *args: starts.append(args[7].storage_offset()) or inner(*args),
    )
    monkeypatch.setattr(config, "INTERPRETED_SHORT", 0)
    student, teacher = (qkv(1, 1, length, 8, seed=seed) for seed in range(2))
    value_and_grads(functional.attention_kl, student, *teacher, impl="triton")
    assert starts
    assert all(start % 4 == 0 for start in starts)


def test_refuses_what_it_cannot_hold(monkeypatch):
    wide = torch.zeros(1, 1, 4, 160)
    assert "up to 128, got 160" in ops.refusal("relation_kl", [wide] * 4)
    with pytest.raises(ValueError, match=r"triton.*relation_kl.*up to 128"):
        functional.attention_kl(wide, wide, wide, wide, impl="triton")
    assert ops.refusal("self_relation_kl", [wide[..., :128]] * 2) is None
    assert "float64" in ops.refusal("relation_kl", [wide[..., :64].double()] * 4)
    long = torch.empty(1, 1, attention.HALF_LIMIT + 1, 1, dtype=torch.float16)
    assert "float16" in ops.refusal("relation_kl", [long] * 4)
    monkeypatch.setattr(ops, "interpreting", lambda: False)
    assert ops.refusal("relation_kl", [wide] * 4) == "it needs CUDA tensors, got one on cpu"


def test_offsets_beyond_32_bits(form):
    """Three sequences 2^30 elements apart: only the pages that are touched exist."""
    student, teacher = qkv(3, 1, 17, 16, seed=0, dtype=torch.float16), qkv(3, 1, 17, 16, seed=1)
    memory = torch.empty(2**31 + 2**12, dtype=torch.float16)
    far = memory.as_strided(student[0].shape, (2**30, 16, 16, 1))
    far.copy_(student[0])
    weight = torch.ones(3, 1, 17)
    near_loss, *near = ops.relation_kl_fwd_bwd(weight, *student, *teacher, None, *SCALES)
    sides = relation_kl.positive_sides(far, student[1], *teacher, 1.0, 1.0)
    assert sides[0].stride() == far.stride()
    loss, *grads = ops.relation_kl_fwd_bwd(weight, far, student[1], *teacher, None, *SCALES)
    assert loss == near_loss
    for got, want in zip(grads, near, strict=True):
        assert torch.equal(got, want)


def test_every_form_has_a_configuration_for_every_architecture():
    for form in config.FORMS:
        for bits in (16, 32):
            for width in (1, 64, 100):
                old, new = (config.shipped(form, bits, width, c) for c in (75, 130))
                assert old == config.shipped(form, bits, width, 80)
                # Unknown ones take the newest that is not newer.
                assert new == config.shipped(form, bits, width, 120)
                if form in ("rows", "grad_rows", "grad_keys", "pairs"):
                    assert None not in (old, new)
                tried = list(config.candidates(form, bits, width, 90))
                assert tried[:1] == [x for x in [config.shipped(form, bits, width, 90)] if x]
                assert len(set(tried)) == len(tried)


def test_tuned_configurations_are_kept_per_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKD_TUNE_DIR", str(tmp_path / "tune"))
    assert config.read_tuned("NVIDIA H200") == {}
    best = config.Config(64, 64, 4, 2)
    file = config.write_tuned("NVIDIA H200", {config.tuned_key("grad_rows", 16, 60): best})
    config.write_tuned("NVIDIA H200", {config.tuned_key("rows", 32, 16): best})
    assert config.read_tuned("NVIDIA H200") == {"grad_rows/16/64": best, "rows/32/16": best}
    assert config.read_tuned("NVIDIA A100") == {}
    (x, _), usual = qkv(1, 1, 4, 60, seed=0, dtype=torch.float16), config.INTERPRETED
    with config.trial("grad_rows/16/64", best):
        assert config.lookup("grad_rows", x, x) == best
        assert config.lookup("rows", x, x) == usual
    assert config.lookup("grad_rows", x, x) == usual
    file.write_text('{"rows/32/16": [1]}')
    with pytest.raises(ValueError, match=r"NVIDIA-H200.*Delete it"):
        config.read_tuned("NVIDIA H200")


# (what stands there, what breaks it): a rescale dropped, a mask that lets pads through, a weight left out.
MUTATIONS = {
    "sum not rescaled": ("l_s = l_s * decay_s + tl.sum(p_s, 1)", "l_s = l_s + tl.sum(p_s, 1)"),
    "gradient not rescaled": ("difference * decay_s[:, None] + ", "difference + "),
    "ratio not followed": (" + teacher * turn[:, None]", ""),
    "pads let through": ("bias = tl.where(keep, 0.0, LOW)[None, :]", "bias = tl.where(keep, 0.0, 0.0)[None, :]"),
    "weight left out": ("difference * (w * grad_scale / l_s)[:, None]", "difference * (grad_scale / l_s)[:, None]"),
    "keys' weight left out": ("ratio[:, None]) * factor[:, None]", "ratio[:, None])"),
    "teacher not normalised": ("p_t * ratio[:, None]) * factor", "p_t) * factor"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_noticed(mutation, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "INTERPRETED_SHORT", 0)
    student, teacher = qkv(2, 1, 70, 16, seed=0), qkv(2, 1, 70, 16, seed=1)
    mask = mask_of("holes", 2, 70)
    module = broken(tmp_path, "relation_kl", *MUTATIONS[mutation])
    for kernel in ("relation_kl_rows_kernel", "relation_kl_keys_kernel"):
        monkeypatch.setattr(relation_kl, kernel, getattr(module, kernel))
    assert compare(student, teacher, mask, rows=False) > 0.01


SHORT_MUTATIONS = {
    "pads let through": ("short", "tl.where(real, 0.0, LOW)", "tl.where(real, 0.0, 0.0)"),
    "last key forgotten": ("short", "return key_end, tl.where", "return key_end - 1, tl.where"),
    "last row forgotten": ("short", "tl.load(extents + ROW_END), 0)", "tl.load(extents + ROW_END) - 1, 0)"),
    "a head visited by nobody": ("short", "tl.minimum(first + each, total)", "tl.minimum(first + each, total - 1)"),
    "loss unweighted": ("short", "tl.where(w != 0, w * kl, 0.0)", "kl"),
    "teacher not normalised": ("short", "p_t * ratio[:, None])", "p_t)"),
    "roles swapped": ("short", "dot(tl.trans(difference), x_s", "dot(difference, x_s"),
    "factor forgotten": ("short", "(scale_b / weight_scale)", "(1.0 / weight_scale)"),
    "one role forgotten": ("self", "grad = dot_add(tl.trans(difference), own_s, grad, FP32_S) *", "grad = grad *"),
    "rows' end taken for the keys'": ("self", "used = tl.maximum(key_end, row_end)", "used = row_end - 1"),
    "self loss unweighted": ("self", "tl.where(w != 0, w * kl, 0.0)", "kl"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", SHORT_MUTATIONS)
def test_a_broken_short_kernel_is_noticed(mutation, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "INTERPRETED_SHORT", 512)
    which, old, new = SHORT_MUTATIONS[mutation]
    sides = [qkv(2, 1, 40, 16, seed=seed) for seed in (0, 1)]
    if which == "short":
        module = broken(tmp_path, "relation_kl_short", old, new)
        monkeypatch.setattr(
            relation_kl, "relation_kl_short_kernel", module.relation_kl_short_kernel
        )
    else:
        sides = [side[:1] for side in sides]
        module = broken(tmp_path, "self_relation_kl", old, new)
        monkeypatch.setattr(
            self_relation_kl, "self_relation_kl_short_kernel", module.self_relation_kl_short_kernel
        )
    # Weights larger than in training: the sums of "loss unweighted" must not hide below a tolerance.
    mask = mask_of("holes", 2, 40)
    weight = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(3)) * mask[:, None]
    assert compare(*sides, mask, weight, rows=False) > 0.01
