"""What "auto" picks, and the check that stands between an unproven kernel and a user who did not ask for it."""

import types
import warnings

import pytest
import torch
from attention_cases import qkv

from bertkd import functional
from bertkd.ops import chunked, dispatch, implementations, schema, verify
from bertkd.ops.schema import value_form

OPS = verify.TENSORS


@pytest.fixture
def fast(monkeypatch):
    """A pretended implementation for CPUs: chunked, with one function replaceable."""
    module = types.SimpleNamespace(
        **{name: getattr(chunked, name) for name in chunked.__all__},
        unavailable=lambda: None,
        refusal=lambda op, tensors: None,
    )
    real = implementations.implementation
    for user in (implementations, dispatch, verify):
        monkeypatch.setattr(
            user, "implementation", lambda impl: module if impl == "fast" else real(impl)
        )
    monkeypatch.setattr(dispatch, "PREFERRED", {"cpu": "fast"})
    monkeypatch.setattr(implementations, "_warned", set())
    monkeypatch.setattr(verify, "_verdicts", {})
    return module


def test_auto_prefers_the_fast_one_and_says_why_not(fast):
    tensors = [torch.randn(1, 1, 4, 8)] * 4
    assert dispatch.resolve("relation_kl", "auto", tensors).impl == "fast"
    fast.refusal = lambda op, tensors: "its head width is odd"
    choice = dispatch.resolve("relation_kl", "auto", tensors)
    assert choice == ("chunked", "the portable default; fast is out: its head width is odd")
    fast.unavailable = lambda: "it is not built"
    assert "it is not built" in dispatch.resolve("relation_kl", "auto", tensors).reason
    with pytest.raises(ValueError, match="impl='fast' cannot run relation_kl: it is not built"):
        dispatch.resolve("relation_kl", "fast", tensors)
    assert (
        dispatch.resolve("relation_kl", "auto", [torch.empty(1, device="meta")]).impl == "chunked"
    )


def test_the_environment_overrides_auto_but_not_an_argument(monkeypatch):
    monkeypatch.setenv("BERTKD_IMPL", "")
    assert dispatch.requested() == "auto"
    monkeypatch.setenv("BERTKD_IMPL", "chunked")
    assert dispatch.requested() == "chunked"
    assert dispatch.requested("eager") == "eager"
    with pytest.raises(ValueError, match="impl='chunked' does not implement min_prob"):
        dispatch.requested(eager_only="min_prob")


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_right_kernel_passes_its_check_once(op, fast, monkeypatch):
    compared = []
    real = verify.compare
    monkeypatch.setattr(verify, "compare", lambda *a: compared.append(a) or real(*a))
    dims = 4 if "relation" in op or op == "attention_mse" else 2
    tensors = [torch.randn([2] * (dims - 1) + [8]) for _ in range(OPS[op])]
    for _ in range(3):
        assert verify.disagreement(op, "fast", tensors) is None
    assert len(compared) == 1
    verify.disagreement(op, "fast", [x.half() for x in tensors])
    assert len(compared) == 2


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "crash"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_wrong_kernel_is_kept_away_with_a_warning(op, fault, fast):
    right = getattr(chunked, f"{op}_fwd_bwd")

    def wrong(*args):
        loss, *grads = right(*args)
        first = grads[0][0] if isinstance(grads[0], list) else grads[0]
        if fault == "crash":
            raise RuntimeError("no kernel image")
        if fault == "value":
            loss = loss * 1.001
        elif fault == "gradient":
            first[0] *= 1.01
        else:
            first.fill_(float("nan"))
        return loss, *grads

    setattr(fast, f"{op}_fwd_bwd", wrong)
    dims = 4 if "relation" in op or op == "attention_mse" else 2
    tensors = [torch.randn([2] * (dims - 1) + [8]) for _ in range(OPS[op])]
    with pytest.warns(RuntimeWarning, match=f"does not use impl='fast' for {op}"):
        problem = verify.disagreement(op, "fast", tensors)
    assert ("no kernel image" if fault == "crash" else "off by") in problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify.disagreement(op, "fast", tensors) == problem


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_form_without_gradients_has_a_check_of_its_own(op, fast):
    form = value_form(op)
    right = getattr(chunked, f"{op}_{form}")
    setattr(fast, f"{op}_{form}", lambda *args: right(*args) * 1.001)
    dims = 4 if "relation" in op or op == "attention_mse" else 2
    tensors = [torch.randn([2] * (dims - 1) + [8]) for _ in range(OPS[op])]
    assert verify.disagreement(op, "fast", tensors) is None
    with pytest.warns(RuntimeWarning, match=f"does not use impl='fast' for {op}"):
        assert "off by" in verify.disagreement(op, "fast", tensors, form)


def test_a_bias_does_not_keep_a_kernel_away(fast):
    h, weight, bias = torch.randn(5, 8), torch.randn(8, 8), torch.randn(8)
    assert verify.disagreement("hidden_proj_mse", "fast", [h, weight, bias, h]) is None
    assert verify.disagreement("linear_kl", "fast", [h, weight, bias, h, weight, bias]) is None


@pytest.mark.parametrize("op", ["hidden_proj_mse", "hidden_combine_mse", "linear_kl"])
def test_a_kernel_is_checked_with_a_bias_where_it_is_to_run_with_one(op, fast):
    right = getattr(chunked, f"{op}_fwd_bwd")
    at = 3  # of the student's bias, among the arguments of each of the three

    def deaf(*args):
        loss, *grads = right(*args[:at], None, *args[at + 1 :])
        return loss, *grads[:-1], torch.zeros(0 if args[at] is None else args[at].shape[0])

    setattr(fast, f"{op}_fwd_bwd", deaf)
    h, weight, bias = torch.randn(5, 8), torch.randn(8, 8), torch.randn(8)
    teacher = [h, weight] if op == "linear_kl" else [h]
    assert verify.disagreement(op, "fast", [h, weight, *teacher]) is None
    with pytest.warns(RuntimeWarning, match=f"does not use impl='fast' for {op}"):
        assert "off by" in verify.disagreement(op, "fast", [h, weight, bias, *teacher])


@pytest.mark.parametrize("op", verify.ATTENTION)
def test_a_kernel_is_checked_without_a_mask_where_it_is_to_run_without_one(op, fast):
    right = getattr(chunked, f"{op}_fwd_bwd")

    def wrong_without(*args):
        loss, *grads = right(*args)
        unmasked = not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args)
        return loss * (1 + unmasked), *grads

    setattr(fast, f"{op}_fwd_bwd", wrong_without)
    tensors = [torch.randn(2, 2, 2, 8) for _ in range(OPS[op])]
    assert verify.disagreement(op, "fast", tensors) is None
    with pytest.warns(RuntimeWarning, match=f"does not use impl='fast' for {op}"):
        assert "off by" in verify.disagreement(op, "fast", tensors, masked=False)


def test_a_device_that_is_not_there_is_named():
    device = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"explain: device '{device}' cannot be used here: "):
        dispatch.explain("attention_kl", device=device)
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        dispatch.explain("attention_kl", device="gpu")


def test_losses_and_explain_say_whether_there_is_a_mask(monkeypatch):
    asked, real = [], dispatch.resolve
    for user in (schema, dispatch):
        monkeypatch.setattr(
            user, "resolve", lambda *a, **told: asked.append(told) or real(*a, **told)
        )
    x, mask = torch.randn(1, 2, 4, 8), torch.ones(1, 4, dtype=torch.long)
    functional.attention_kl(x, x, x, x, mask)
    functional.attention_mse(x, x, x, x)
    dispatch.explain("attention_kl", x, x, x, x, mask)
    dispatch.explain("attention_kl")
    assert asked == [{"masked": masked} for masked in (True, False, True, False)]


def test_a_mask_makes_no_other_kind_of_rows_of_states(fast):
    states = [torch.randn(5, 8)] * 2
    for masked in (True, False):
        assert verify.disagreement("hidden_mse", "fast", states, masked=masked) is None
    assert len(verify._verdicts) == 1


@pytest.mark.parametrize(
    ("length", "checked"),
    [(1, 13), (16, 13), (17, 29), (32, 29), (33, 61), (64, 61), (65, 125), (128, 125), (129, 261)],
)
def test_the_form_that_is_checked_is_the_one_that_runs(fast, length, checked):
    """Kernels that hold whole heads are for up to 16, 32, 64 and 128 tokens."""
    tensors = [torch.empty(1, 1, length, 8)] * 4
    assert verify._small_sizes("relation_kl", "fast", tensors).length == checked


def test_a_check_has_pads_rows_without_weight_and_its_tensors_own_dtypes():
    half, full = torch.float16, torch.float32
    sizes = verify.Sizes(length=9)
    rows, *_, mask, _, _ = verify.random_case("relation_kl", [half] * 4, sizes, "cpu")
    assert mask.sum(1).tolist() == [9, 4, 0]
    assert torch.equal(rows[:, 1] != 0, mask)
    _, (h_s,), weight, _, h_t = verify.random_case(
        "hidden_combine_mse", [half, full, half], sizes, "cpu"
    )
    assert [x.dtype for x in (h_s, weight, *h_t)] == [half, full, half, half]
    mixed = verify.random_case("softmax_kl", [full, half], sizes, "cpu")
    assert verify.compare("softmax_kl", "chunked", mixed).allowed >= verify.TOLERANCE[half]
    # Where the result is to be 0 the error is not relative to it.
    assert verify.relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1.0


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_of_many_sequences_one_is_of_pads_only(batch):
    """`bertkd tune` times kernels on such a case: hardly anything but pads would say nothing."""
    sizes = verify.Sizes(batch, length=10, widths=(4, 4))
    weight, *_, mask, _, _ = verify.random_case("relation_kl", [torch.float32] * 4, sizes, "cpu")
    want = [10, 5, 10, 5, 10, 5, 10, 0] if batch == 8 else [10, 5, 0][:batch]
    assert mask.sum(1).tolist() == want
    assert (weight[:, 0] > 0).sum(1).tolist() == want


def test_no_gradient_is_made_where_nobody_wants_one(monkeypatch):
    def wrong(*_):
        raise AssertionError("gradients were computed")

    for op in OPS:
        monkeypatch.setattr(chunked, f"{op}_fwd_bwd", wrong)
    monkeypatch.setenv("BERTKD_IMPL", "chunked")
    (h_s, h_t), weight = torch.randn(2, 5, 6), torch.randn(6, 6).requires_grad_()
    z = torch.randn(1, 2, 5, 4)

    def losses():
        yield functional.hidden_mse(h_s, h_t)
        yield functional.hidden_mse(h_s, h_t, weight=weight)
        yield functional.hidden_combine_mse([h_s], [h_t], weight)
        yield functional.hidden_cosine(h_s, h_t)
        yield functional.softmax_kl(h_s, h_t)
        yield functional.linear_kl(h_s, weight, h_t, weight)
        yield functional.relation_kl(z, z, z, z)
        yield functional.relation_kl(z, z.clone(), z, z)
        yield functional.attention_mse(z, z, z, z)

    with torch.no_grad():
        assert all(torch.isfinite(loss) for loss in losses())


def test_the_self_relation_is_its_general_form_with_both_gradients_added():
    (x_s, _), (x_t, _) = qkv(2, 3, 40, 8, seed=0), qkv(2, 3, 40, 8, seed=1)
    for reduction in ("mean", "none"):
        results = []
        for b_s in ("itself", "a copy"):
            x = x_s.clone().requires_grad_()
            b = x if b_s == "itself" else x.clone()
            loss = functional.relation_kl(x, b, x_t, x_t, reduction=reduction, impl="chunked")
            results.append((loss.detach(), torch.autograd.grad((loss * 3).sum(), x)[0]))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.fixture
def gpu(monkeypatch):
    """A tensor as on a GPU, for which every kernel is there and what it says of one can be set."""
    triton = types.SimpleNamespace(unavailable=lambda: None, refusal=lambda op, tensors: None)
    for user in (implementations, dispatch):
        monkeypatch.setattr(user, "implementation", lambda impl: triton)
    monkeypatch.setattr(implementations, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    device = torch.device("cuda", 0)
    tensor = types.SimpleNamespace(device=device, dtype=torch.float32, shape=(2, 3, 7, 8))
    tensor.dim = lambda: 4
    return triton, tensor


def test_on_a_gpu_auto_takes_kernels_that_are_proven_or_agree(gpu, monkeypatch):
    triton, x = gpu
    asked, said = [], []
    monkeypatch.setattr(verify, "disagreement", lambda *args: asked.append(args) or said[-1])
    said.append(None)
    assert dispatch.resolve("relation_kl", "auto", [x], "rows") == ("triton", "the fastest on cuda")
    assert asked == [("relation_kl", "triton", [x], "rows", True)]
    said.append("it is off")
    with pytest.warns(RuntimeWarning, match="relation_kl on cuda by its portable .*: it is off"):
        assert dispatch.resolve("relation_kl", "auto", [x]).impl == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("relation_kl", "auto", [x]).impl == "chunked"
        monkeypatch.setattr(dispatch, "PROVEN_GPUS", frozenset({"A GPU"}))
        assert dispatch.resolve("relation_kl", "auto", [x]).impl == "triton"
        assert len(asked) == 3
        # Float64 is for checking gradients: nobody expects a fast path there.
        triton.refusal = lambda op, tensors: "its kernels do not compute in float64"
        x.dtype = torch.float64
        assert dispatch.resolve("relation_kl", "auto", [x]).impl == "chunked"


def test_nothing_is_checked_inside_a_capture(gpu, monkeypatch):
    _, x = gpu
    compared = []
    monkeypatch.setattr(verify, "_verdicts", {})
    monkeypatch.setattr(verify, "_verdict", lambda *kind: compared.append(kind))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "warm up first" in verify.disagreement("relation_kl", "triton", [x])
    assert not compared
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert verify.disagreement("relation_kl", "triton", [x]) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verify.disagreement("relation_kl", "triton", [x]) is None
    assert len(compared) == 1
