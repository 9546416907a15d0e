"""The kernel that multiplies a gradient in place, in the interpreter or on a GPU."""

import math

import pytest
import torch

pytest.importorskip("triton")

from bertkd.ops import implementations
from bertkd.ops.triton import scale
from bertkd.ops.triton.scale import BLOCK, can_scale, is_right, scale_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter reads and writes bfloat16 rightly, and multiplies in float32.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2, 3, 40, 16), (BLOCK + 5,)])
def test_multiplies_in_float32_and_rounds_once(shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    factor = torch.tensor(1 / 3, device=DEVICE)
    want = (x.double() * factor.double()).to(dtype)
    assert can_scale(x, factor)
    scale_([x], factor)
    torch.testing.assert_close(x, want, rtol=torch.finfo(dtype).eps, atol=0)


def test_any_order_of_the_dimensions():
    x = torch.randn(2, 5, 3, 8, device=DEVICE).transpose(1, 2)
    want = x * 2.5
    factor = torch.tensor(2.5, device=DEVICE)
    assert can_scale(x, factor)
    scale_([x], factor)
    assert torch.equal(x, want)


def test_one_leaves_every_bit_and_nan_spreads():
    x = torch.tensor([1.0, -0.0, math.inf, 1e-40], device=DEVICE)
    bits = x.view(torch.int32).clone()
    scale_([x], torch.tensor(1.0, device=DEVICE))
    assert torch.equal(x.view(torch.int32), bits)
    scale_([x], torch.tensor(math.nan, device=DEVICE))
    assert x.isnan().all()


def test_many_of_several_sizes_and_dtypes():
    shapes = [(7, 3), (2, 3, 40, 16), (BLOCK + 5,), (7, 3)] * 10
    xs = [torch.randn(s, device=DEVICE).to(DTYPES[i % 2]) for i, s in enumerate(shapes)]
    factor = torch.tensor(1 / 3, device=DEVICE)
    want = [(x.double() / 3).to(x.dtype) for x in xs]
    scale_(xs, factor)
    for x, right in zip(xs, want, strict=True):
        torch.testing.assert_close(x, right, rtol=torch.finfo(x.dtype).eps, atol=0)


def test_as_many_numbers_as_31_bits_hold(monkeypatch):
    count = 2**31 - 1
    factor = torch.tensor(3.0, device=DEVICE)
    if DEVICE == "cuda":
        x = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
        scale_([x], factor)
        assert [bound.item() for bound in x.aminmax()] == [3.0, 3.0]
        return
    # The interpreter would take an hour for all blocks: how many there are, and that the first is multiplied.
    x = torch.empty(count, dtype=torch.bfloat16)
    x[:BLOCK] = 1.0
    kernel, asked = scale.scale_kernel, []

    class FirstBlock:
        def __getitem__(self, grid):
            def launch(xs, by, count, blocks, BLOCK, **options):
                asked.append((count, blocks))
                kernel[1, 1](xs, by, count, 1, BLOCK=BLOCK, **options)

            return launch

    monkeypatch.setattr(scale, "scale_kernel", FirstBlock())
    scale_([x], factor)
    assert asked == [(count, 2**31 // BLOCK)]
    assert (x[:BLOCK] == 3.0).all()


def test_a_fake_factor_is_no_pointer(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bertkd.ops import autograd

    monkeypatch.setattr(autograd, "unavailable", lambda impl: None)
    with FakeTensorMode():
        factor, grad = torch.ones((), device="cuda"), torch.ones(3, device="cuda")
        assert autograd._by_kernel([grad], factor) == ()


def test_gaps_other_dtypes_and_empty_tensors_are_left_to_pytorch():
    factor = torch.tensor(2.0, device=DEVICE)
    assert not can_scale(torch.zeros(4, 6, device=DEVICE)[:, :5], factor)
    assert not can_scale(torch.zeros(1, device=DEVICE).expand(4), factor)
    assert not can_scale(torch.zeros(3, device=DEVICE, dtype=torch.float64), factor)
    assert not can_scale(torch.zeros(0, device=DEVICE), factor)
    assert not can_scale(torch.zeros(3, device=DEVICE), torch.ones(2, device=DEVICE))


# The interpreter cuts bfloat16 off where a GPU rounds it, which the trial would notice.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:2])
def test_it_is_tried_before_it_is_trusted(dtype, monkeypatch):
    monkeypatch.setattr(scale, "_right", {})
    device = torch.device(DEVICE)
    assert is_right(dtype, device)
    monkeypatch.setattr(scale, "_right", {})
    monkeypatch.setattr(scale, "scale_", lambda xs, factor: None)
    with pytest.warns(RuntimeWarning, match="kernel is wrong"):
        assert not is_right(dtype, device)

    def fails(xs, factor):
        raise OSError("no C compiler")

    monkeypatch.setattr(implementations, "_warned", set())
    monkeypatch.setattr(scale, "_right", {})
    monkeypatch.setattr(scale, "scale_", fails)
    with pytest.warns(RuntimeWarning, match="kernel raised OSError: no C compiler"):
        assert not is_right(dtype, device)
