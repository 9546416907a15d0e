"""What needs a GPU: run by `make gpu`."""

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from oracle import relative

from bertkd import functional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [functional.attention_kl, functional.attention_mse])
@pytest.mark.parametrize("length", [1, 17, 200])
def test_chunked_on_the_device_errs_no_more_than_eager(loss, dtype, length):
    student = [x.cuda() for x in qkv(3, 4, length, 16, seed=0, dtype=dtype)]
    teacher = [x.cuda() for x in qkv(3, 4, length, 16, seed=1, dtype=dtype)]
    mask = ragged_mask(3, length, seed=2, empty_row=True).cuda()
    double = [[x.double() for x in side] for side in (student, teacher)]
    exact = value_and_grads(loss, double[0], *double[1], mask, impl="eager")
    eager = value_and_grads(loss, student, *teacher, mask, impl="eager")
    actual = value_and_grads(loss, student, *teacher, mask, impl="chunked")
    for got, same, want in zip(actual, eager, exact, strict=True):
        assert got.device.type == "cuda"
        assert relative(got, want) <= 2 * relative(same, want) + 1e-5


def test_logit_losses_on_the_device():
    z_s, z_t = torch.randn(64, 1000, device="cuda"), torch.randn(64, 1000, device="cuda")
    exact = value_and_grads(functional.softmax_kl, [z_s.double()], z_t.double(), impl="eager")
    actual = value_and_grads(functional.softmax_kl, [z_s], z_t, impl="chunked")
    for got, want in zip(actual, exact, strict=True):
        assert relative(got, want) < 1e-5


def test_memory_at_length_8192_is_a_fraction_of_the_maps():
    student = [x.cuda() for x in qkv(1, 12, 8192, 64, seed=0, dtype=torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value_and_grads(functional.attention_kl, student, *student, impl="chunked")
    extra = torch.cuda.max_memory_allocated() - before
    # Eager keeps at least four float32 maps of 12 x 8192 x 8192.
    assert extra < 0.1 * 4 * 12 * 8192**2 * 4
