"""The memory bank against a float64 formula in Python loops; its draws against Python integers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from contrast_checks import D_S, D_T, DIM, N, features, gradient, unit
from torch import Tensor

from bertkd.contrast import MemoryBankContrast


def splitmix(x: int) -> int:
    """Output number x (from 0) of splitmix64 with seed 0, as published."""
    z = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_splitmix_reference_value() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF


class NaiveBank:
    """The memory bank contrast in float64, one example and one negative at a time."""

    def __init__(self, module: MemoryBankContrast, seed: int) -> None:
        self.module, self.seed, self.step = module, seed, 0
        self.memory_s = module.memory_s.double().clone()
        self.memory_t = module.memory_t.double().clone()
        self.classes: dict[int, int] = {}
        self.z = None

    def negatives(self, index: list[int], labels: list[int] | None) -> list[list[int]]:
        n, k = self.module.num_examples, self.module.negatives
        key = splitmix(splitmix(splitmix(self.seed) + self.step))
        rows = []
        for b, i in enumerate(index):
            pool = [j for j in range(n) if j != i]
            if labels is not None:
                classes = [(self.classes.get(j, -1), j) for j in range(n)]
                pool = [j for label, j in sorted(classes) if label != labels[b]]
            draws = [splitmix(key + b * k + c) >> 33 for c in range(k)]
            rows.append([pool[draw * len(pool) >> 31] for draw in draws])
        return rows

    def __call__(
        self, f_s: Tensor, f_t: Tensor, index: list[int], labels: list[int] | None
    ) -> Tensor:
        module, n, k = self.module, self.module.num_examples, self.module.negatives
        if labels is not None:
            self.classes |= dict(zip(index, labels, strict=True))
        v_s, v_t = unit(module.embed_s, f_s), unit(module.embed_t, f_t)
        rows = [[i, *more] for i, more in zip(index, self.negatives(index, labels), strict=True)]
        loss, z = 0.0, []
        for side, (v, memory) in enumerate(((v_s, self.memory_t), (v_t, self.memory_s))):
            p = [
                [torch.exp(memory[r] @ v[b] / module.temperature) for r in rows[b]]
                for b in range(len(index))
            ]
            if self.z is None:
                flat = [x.item() for row in p for x in row]
                z.append(sum(flat) / len(flat) * n)
            this_z = z[side] if self.z is None else self.z[side]
            noise = k / n
            for row in p:
                first = row[0] / this_z
                loss = loss - torch.log(first / (first + noise + module.eps))
                for x in row[1:]:
                    loss = loss - torch.log(noise / (x / this_z + noise + module.eps))
        self.z = self.z or z
        # Copies, because the old entries are still needed for the gradient.
        self.memory_s, self.memory_t = self.memory_s.clone(), self.memory_t.clone()
        for memory, v in ((self.memory_s, v_s), (self.memory_t, v_t)):
            for b, i in enumerate(index):
                mixed = module.momentum * memory[i] + (1 - module.momentum) * v[b].detach()
                memory[i] = mixed / mixed.norm()
        self.step += 1
        return loss / (2 * len(index))


@pytest.mark.parametrize("kind", ["none", "classes", "regression"])
@pytest.mark.parametrize(("temperature", "eps"), [(0.07, 1e-7), (0.01, 0.1)])
def test_bank_against_loops(kind: str, temperature: float, eps: float) -> None:
    # At temperature 0.01 a plain exp overflows fp32.
    options = {"dim": DIM, "negatives": 7, "momentum": 0.3, "temperature": temperature, "eps": eps}
    module = MemoryBankContrast(N, D_S, D_T, seed=11, **options)
    naive = NaiveBank(module, seed=11)
    for step, index in enumerate([[3, 0, 19, 7], [1, 3], [4, 7, 8, 9, 10]]):
        f_s, f_t = features(len(index), seed=step)
        labels = [i % 3 for i in index] if kind == "classes" else None
        given = {"none": None, "classes": labels, "regression": [0.5 * i for i in index]}[kind]
        given = None if given is None else torch.tensor(given)
        loss = module(f_s, f_t, index=torch.tensor(index), labels=given)
        expected = naive(f_s, f_t, index, labels)
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
        torch.testing.assert_close(
            gradient(loss, f_s), gradient(expected, f_s), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(module.memory_s.double(), naive.memory_s)
        torch.testing.assert_close(module.memory_t.double(), naive.memory_t)
        z = torch.tensor(naive.z, dtype=torch.double).log()
        torch.testing.assert_close(module.log_z.double(), z, rtol=1e-5, atol=1e-5)


def test_bank_negatives_are_uniform() -> None:
    module = MemoryBankContrast(9, D_S, D_T, dim=DIM, negatives=20_000)
    index, labels = torch.tensor([0, 4, 8]), torch.tensor([1, 0, 2])
    module.labels.copy_(torch.tensor([1, -1, 1, 0, 0, 2, 2, 2, 2]))
    for drawn, pools in (
        (module._draw_negatives(index, None), [set(range(9)) - {i} for i in (0, 4, 8)]),
        (
            module._draw_negatives(index, labels),
            [{1, 3, 4, 5, 6, 7, 8}, {0, 1, 2, 5, 6, 7, 8}, {0, 1, 2, 3, 4}],
        ),
    ):
        assert drawn.shape == (3, 20_000)
        for row, pool in zip(drawn.tolist(), pools, strict=True):
            counts = Counter(row)
            assert counts.keys() == pool
            share = 1 / len(pool)
            spread = math.sqrt(20_000 * share * (1 - share))
            assert all(abs(c - 20_000 * share) < 5 * spread for c in counts.values())
    assert not torch.equal(drawn[0, :10], drawn[1, :10])


def test_bank_with_one_class_draws_from_all() -> None:
    module = MemoryBankContrast(4, D_S, D_T, dim=DIM, negatives=200)
    module.labels.fill_(0)
    drawn = module._draw_negatives(torch.tensor([2]), torch.tensor([0]))
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}
