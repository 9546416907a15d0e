"""What does not count may hold anything: classes that the teacher rules out, rows of weight 0, no rows at all."""

import pytest
import torch
from attention_cases import qkv, value_and_grads
from oracle import relative
from torch.nn.functional import kl_div

from bertkd import functional
from bertkd.ops import native

IMPLS = [
    "eager",
    "chunked",
    pytest.param("native", marks=pytest.mark.skipif(native.unavailable(), reason="not built")),
]


def logits(seed):
    return torch.randn(5, 1100, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e30, float("-inf")])
@pytest.mark.parametrize("sides", ["both", "teacher"])
@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
def test_classes_that_the_teacher_rules_out(impl, sides, value):
    if impl == "triton":
        pytest.importorskip("triton")
    for classes in (9, 1100):
        z_s, z_t = logits(0)[:, :classes], logits(1)[:, :classes]
        z_t[:, 7:] = value
        if sides == "both":
            z_s[:, 7:] = value
        # In float64, over the classes that are left in the sum; the student's others only take mass away.
        log_p, p = z_s.double().log_softmax(-1)[:, :7], z_t[:, :7].double().softmax(-1)
        want = kl_div(log_p, p, reduction="batchmean")
        loss = functional.softmax_kl(z_s.requires_grad_(), z_t, impl=impl)
        (grad,) = torch.autograd.grad(loss, z_s)
        assert relative(loss, want) < 1e-5
        assert relative(grad, (z_s.double().softmax(-1) - z_t.double().softmax(-1)) / 5) < 1e-5
        with torch.no_grad():
            assert relative(functional.softmax_kl(z_s, z_t, impl=impl), want) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_a_class_that_only_the_student_rules_out_is_not_overlooked(impl):
    z_s, z_t = logits(0), logits(1)
    z_s[:, 3] = float("-inf")
    assert functional.softmax_kl(z_s, z_t, impl=impl) > 1e30
    z_t[:, 5] = float("nan")
    assert functional.softmax_kl(z_s, z_t, impl=impl).isnan()


ROWS = [functional.softmax_kl, functional.hidden_mse, functional.hidden_cosine]


@pytest.mark.parametrize("loss", ROWS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("impl", ["auto", *IMPLS[1:], "triton"])
def test_rows_that_do_not_count_may_hold_nan(loss, impl):
    if impl == "native" and native.refusal(loss.__name__, []):
        pytest.skip(native.refusal(loss.__name__, []))
    if impl == "triton":
        pytest.importorskip("triton")
    x, y, mask = logits(0), logits(1), torch.tensor([1, 1, 0, 1, 0])
    value, grad = value_and_grads(loss, [x.double()], y.double(), mask, impl="eager")
    x[mask == 0] = float("nan")
    y[mask == 0] = float("inf")
    actual = value_and_grads(loss, [x], y, mask, impl=impl)
    with torch.no_grad():
        actual.append(loss(x, y, mask, impl=impl))
    for got, want in zip(actual, (value, grad, value), strict=True):
        torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count_may_hold_nan_in_evaluation_too(reduction):
    z_s, z_t, mask = logits(0), logits(1), torch.tensor([1, 1, 0, 1, 0])
    want = functional.softmax_kl(z_s, z_t, mask, reduction=reduction)
    z_s[mask == 0] = float("nan")
    z_t[mask == 0] = float("nan")
    torch.testing.assert_close(functional.softmax_kl(z_s, z_t, mask, reduction=reduction), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "loss", [functional.attention_kl, functional.attention_mse, functional.value_relation_kl]
)
def test_no_tokens(loss, impl):
    sides = 1 if loss is functional.value_relation_kl else 2
    student, teacher = qkv(2, 2, 0, 8, seed=0)[:sides], qkv(2, 2, 0, 8, seed=1)[:sides]
    value, *grads = value_and_grads(
        loss, student, *teacher, torch.ones(2, 0, dtype=torch.bool), impl=impl
    )
    assert value == 0
    assert all(grad.shape == (2, 2, 0, 8) for grad in grads)
