"""What the tests of the contrasts share: features, and their embeddings in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

N, D_S, D_T, DIM = 20, 6, 10, 8


def features(batch: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f_s = torch.randn(batch, D_S, generator=generator).requires_grad_()
    return f_s, torch.randn(batch, D_T, generator=generator)


def unit(layer: nn.Linear, f: Tensor) -> Tensor:
    v = f.double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    return v / v.pow(2).sum(1, keepdim=True).sqrt()


def gradient(loss: Tensor, f: Tensor) -> Tensor:
    return torch.autograd.grad(loss, f, retain_graph=True)[0]
