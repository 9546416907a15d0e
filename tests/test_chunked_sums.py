"""What many tiles or blocks of rows add to is summed in float32 and rounded once, however small they are."""

import pytest
import torch
from attention_cases import qkv, value_and_grads
from oracle import relative

from bertkd import functional
from bertkd.ops.chunked import softmax_kl, tiles

BF16 = torch.bfloat16


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def cases():
    """Losses with the student's tensors and the teacher's."""
    student, teacher = (qkv(1, 1, 150, 8, seed=seed, dtype=BF16) for seed in (0, 1))
    h_s, h_t = randn(300, 8, seed=2), randn(300, 12, seed=3)
    weight, bias, decoder = randn(12, 8, seed=4), randn(12, seed=5), randn(12, 12, seed=6)

    def projected(h, weight, bias, h_t, **options):
        return functional.hidden_mse(h, h_t, weight=weight, bias=bias, **options)

    def combined(h, weight, bias, h_t, **options):
        return functional.hidden_combine_mse([h], [h_t], weight, bias, **options)

    return {
        "attention_kl": (functional.attention_kl, student, teacher),
        "value_relation_kl": (functional.value_relation_kl, student[:1], teacher[:1]),
        "attention_mse": (functional.attention_mse, student, teacher),
        "projection": (projected, [h_s, weight, bias], [h_t]),
        "combine": (combined, [h_s, weight.T, bias[:8]], [h_t]),
        "linear_kl": (functional.linear_kl, [h_s, weight], [h_t, decoder]),
    }


@pytest.mark.parametrize("name", cases())
def test_gradients_are_rounded_once(name, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_BUDGET", 150)
    monkeypatch.setattr(softmax_kl, "LEAST_ROWS", 1)
    # Long sequences would be Gram matrices, which one product makes.
    monkeypatch.setattr("bertkd.ops.chunked.attention_mse.gram_pays", lambda *_: False)
    loss, student, teacher = cases()[name]
    exact = value_and_grads(
        loss, [x.double() for x in student], *(x.double() for x in teacher), impl="eager"
    )
    _, *grads = value_and_grads(loss, student, *teacher, impl="chunked")
    for got, want in zip(grads, exact[1:], strict=True):
        assert got.dtype == BF16
        assert relative(got, want) <= torch.finfo(BF16).eps / 2


def test_projected_rows_come_in_blocks_that_are_worth_the_weights():
    sizes = [x.stop - x.start for x in softmax_kl.projected_blocks(600, 9216, torch.device("cpu"))]
    assert sizes == [256, 256, 88]
