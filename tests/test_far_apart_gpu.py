"""64-bit addresses on a real GPU: tensors, gradients included, of more than 2^31 elements."""

import pytest
import torch
from far_apart import case_of, check
from oracle import relative

from bertkd.ops import verify
from bertkd.ops.implementations import implementation, unavailable
from bertkd.ops.schema import value_form
from bertkd.ops.tensors import float_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def freed_memory_is_given_back():
    """Or every worker that has run one of these tests would keep up to 12 GiB from the others."""
    yield
    torch.cuda.empty_cache()


def skip_unless_there_is_memory(gib):
    """Of the whole device: other workers' tests run beside this one."""
    found = torch.cuda.get_device_properties(0).total_memory / 2**30
    if found < gib:
        pytest.skip(f"needs {gib} GiB of device memory, got {found:.0f}")


def skip_unless_it_runs(op, impl, tensors):
    if (reason := unavailable(impl) or implementation(impl).refusal(op, tensors)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("form", ["fwd_bwd", "value"])
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("op", sorted(verify.TENSORS))
def test_offsets_beyond_32_bits(op, impl, form):
    skip_unless_there_is_memory(70)
    case = case_of(op, "cuda")
    skip_unless_it_runs(op, impl, float_tensors(case[1:]))
    form = value_form(op) if form == "value" else form
    function = getattr(implementation(impl), f"{op}_{form}")
    check(function, case, verify.TENSORS[op], weighted=form != "rows")


def repeated(arg, rows, times):
    """What has a row for each of the case's, that many times over; in a model's layout (B, L, H, D)."""
    if isinstance(arg, list):
        return [repeated(x, rows, times) for x in arg]
    if not isinstance(arg, torch.Tensor) or arg.shape[0] != rows:
        return arg
    if arg.dim() == 4:
        return arg.transpose(1, 2).repeat(times, 1, 1, 1).transpose(1, 2)
    return arg.repeat(times, *[1] * (arg.dim() - 1))


LARGE = [
    ("relation_kl", "triton", {"length": 128}),
    ("relation_kl", "cuda", {"length": 128, "heads": 8}),
    ("relation_kl", "triton", {"length": 512}),
    ("self_relation_kl", "triton", {"length": 128}),
    ("self_relation_kl", "cuda", {"length": 128, "heads": 8}),
    ("self_relation_kl", "triton", {"length": 512}),
    ("attention_mse", "triton", {"length": 128}),
    ("attention_mse", "triton", {"length": 1024}),
    ("hidden_mse", "triton", {"widths": (768, 768)}),
    ("hidden_mse", "cuda", {"widths": (768, 768)}),
    ("hidden_cosine", "triton", {"widths": (768, 768)}),
    ("hidden_proj_mse", "triton", {"widths": (768, 64)}),
    ("softmax_kl", "triton", {"widths": (30522, 30522)}),
    ("softmax_kl", "cuda", {"widths": (30522, 30522)}),
    ("linear_kl", "triton", {"widths": (768, 128), "vocabulary": 1000}),
]


def wrong_at_full_size(op, impl, sizes):
    """What is wrong with an op on its small case repeated to more than 2^31 elements, or None."""
    sizes = verify.Sizes(**{"batch": 3, "heads": 4, **sizes})
    case = verify.random_case(op, [torch.bfloat16] * verify.TENSORS[op], sizes, "cuda")
    rows = case[0].shape[0]
    times = -(-(2**31 + 1) // float_tensors(case[1:])[0].numel())
    value, grad, *_ = verify._results(
        getattr(implementation("chunked"), f"{op}_fwd_bwd")(*map(verify._double, case))
    )
    large = [repeated(arg, rows, times) for arg in case]
    found, grads, *_ = verify._results(getattr(implementation(impl), f"{op}_fwd_bwd")(*large))
    assert grads.numel() > 2**31
    # The sum of that many rows is taken in float32.
    if relative(found / times, value) > 1e-3:
        return f"value {found.item() / times} for {value.item()}"
    for first in (0, times // 2 * rows, (times - 1) * rows):
        error = relative(grads[first : first + rows], grad)
        if not error <= 2 * verify.TOLERANCE[torch.bfloat16]:
            return f"gradient of rows from {first} on is off by {error:.1e}"
    return None


def test_more_than_2_to_the_31_elements():
    """One after the other, since each takes tens of GiB."""
    skip_unless_there_is_memory(100)
    findings = {}
    for op, impl, sizes in LARGE:
        if unavailable(impl) is None and (wrong := wrong_at_full_size(op, impl, sizes)):
            findings[op, impl, str(sizes)] = wrong
        torch.cuda.empty_cache()
    assert not findings
