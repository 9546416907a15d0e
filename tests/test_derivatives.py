"""Derivatives that the fused losses do not have are refused; nobody gets a zero in their place."""

import pytest
import torch
from attention_cases import qkv

from bertkd import functional

FUSED = ["auto", "chunked"]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_penalty_is_an_error(impl, reduction):
    factor = torch.ones(8, requires_grad=True)
    (q, k), teacher = qkv(1, 2, 5, 8, seed=0), qkv(1, 2, 5, 8, seed=1)

    def penalty(impl):
        x = q.detach().requires_grad_()
        loss = functional.attention_kl(x * factor, k, *teacher, reduction=reduction, impl=impl)
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        return grad.square().sum()

    with pytest.raises(RuntimeError, match="impl='eager'"):
        penalty(impl).backward()
    penalty("eager").backward()
    assert factor.grad.norm() > 0


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_an_error(impl, reduction):
    z_s, z_t = torch.randn(4, 6), torch.randn(4, 6)

    def loss(z, impl=impl):
        return functional.softmax_kl(z, z_t, impl=impl, reduction=reduction).sum()

    with pytest.raises(NotImplementedError, match="impl='eager'"):
        torch.func.jvp(loss, (z_s,), (z_s,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z_s, torch.ones_like(z_s))
        with pytest.raises(NotImplementedError, match="impl='eager'"):
            loss(dual)
        # Tensors without a tangent have nothing to lose.
        assert loss(z_s) > 0
    assert torch.func.jvp(lambda z: loss(z, "eager"), (z_s,), (z_s,))[1] != 0


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.hessian])
def test_transforms_of_torch_func_are_errors(transform, impl):
    z_s, z_t = torch.randn(4, 6), torch.randn(4, 6)

    def loss(z, impl=impl):
        return functional.softmax_kl(z.reshape(-1, 6), z_t[: z.numel() // 6], impl=impl)

    with pytest.raises(NotImplementedError, match=r"softmax_kl.*torch\.func.*impl='eager'"):
        transform(loss)(z_s)
    assert transform(lambda z: loss(z, "eager"))(z_s).abs().sum() > 0
    # A module without its parameters is no transform.
    got = torch.func.functional_call(torch.nn.Linear(6, 6), {"weight": z_s.T @ z_s}, (z_s,))
    assert functional.softmax_kl(got, z_t, impl=impl) > 0
