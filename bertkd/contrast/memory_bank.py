"""CRD with a memory bank of all training examples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkd.contrast.base import Contrast, gather, rank, row_counts
from bertkd.errors import whole_number


class MemoryBankContrast(Contrast):
    """CRD: every training example's last embeddings, kept in a bank, serve as negatives.

    With unit vectors ``v_s``, ``v_t`` of an example, its bank entries ``m_s[0]``, ``m_t[0]``, those
    of K negatives, ``P = 1 / num_examples`` and ``c = K P + eps``, the student's side is

        p_k  = exp(<m_t[k], v_s> / temperature) / Z_s
        side = -mean_B( log(p_0 / (p_0 + c)) + sum_{k=1..K} log(K P / (p_k + c)) )

    the teacher's has s and t exchanged, and the loss is the mean of both. Z_s and Z_t are
    ``num_examples * mean(exp(score))`` of the first training batch, for good. After that, the
    example's entries become ``normalize(momentum * m + (1 - momentum) * v)``.

    Negatives are drawn with replacement: with integer ``labels`` among the examples not known to
    be of the same class (a class is known once its example was seen; if there is no other, among
    all), else among all other examples. The banks take ``2 * num_examples * dim`` floats;
    `QueueContrast` does without.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", with the choices of Wang
    et al. 2023, "How to Distill your BERT" (mean of the sides, negatives of other classes).

    Args:
        num_examples: size of the training set; ``index`` runs below it.
        d_s: width of the student's features.
        d_t: width of the teacher's features.
        dim: width of the embeddings.
        negatives: K, negatives per example.
        temperature: divides the scores.
        momentum: the share of an old entry that an update keeps.
        eps: as released; guards the quotients.
        seed: fixes embeddings, banks and negatives; the global random state is not used.

    Raises:
        ValueError: for sizes below 1 (``num_examples``: 2), a temperature that is not positive, or
            a momentum outside [0, 1).
    """

    memory_s: Tensor
    memory_t: Tensor
    labels: Tensor
    log_z: Tensor
    log_z_known: Tensor
    draws: Tensor

    def __init__(
        self,
        num_examples: int,
        d_s: int,
        d_t: int,
        *,
        dim: int = 128,
        negatives: int = 100,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(d_s, d_t, dim=dim, temperature=temperature, generator=generator)
        whole_number("num_examples", num_examples, least=2)
        whole_number("negatives", negatives, least=1)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.num_examples, self.negatives = num_examples, negatives
        self.momentum, self.eps = momentum, eps
        bound = math.sqrt(3 / dim)
        for name in ("memory_s", "memory_t"):
            bank = torch.empty(num_examples, dim, device="cpu")
            self.register_buffer(name, bank.uniform_(-bound, bound, generator=generator))
        self.register_buffer("labels", torch.full((num_examples,), -1))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("log_z_known", torch.zeros((), dtype=torch.bool))
        # Seed and step: all draws are a function of these, on any device.
        self.register_buffer("draws", torch.tensor([seed, 0]))

    def _check(
        self, f_s: Tensor, f_t: Tensor, index: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if index is None:
            raise ValueError(
                "index is missing: the memory bank needs the examples' numbers in the training "
                "set (batch column 'index'); QueueContrast and InBatchContrast do not"
            )
        if index.device.type == "cpu" and index.numel() and int(index.max()) >= self.num_examples:
            raise ValueError(
                f"index {int(index.max())} is out of range: the bank was built for "
                f"num_examples={self.num_examples}, numbered 0..{self.num_examples - 1}"
            )
        return super()._check(f_s, f_t, index, labels)

    def _loss(
        self, v_s: Tensor, v_t: Tensor, index: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        assert index is not None  # _check refuses that
        counts = row_counts(index) if self.training else [len(index)]
        if labels is not None and self.training:
            self.labels.index_copy_(0, gather(index, counts), gather(labels, counts))
        rows = torch.cat([index[:, None], self._draw_negatives(index, labels)], dim=1)
        sides = ((self.memory_t, v_s), (self.memory_s, v_t))
        scores = torch.stack([torch.einsum("bkd,bd->bk", m[rows].float(), v) for m, v in sides])
        scores = scores / self.temperature
        log_z = self._normalisers(scores, counts)
        if self.training:
            self._remember(v_s, v_t, index, counts)

        # In logarithms, where neither exp(1 / temperature) nor the quotients can overflow.
        log_p = scores - log_z[:, None, None]
        log_noise = math.log(self.negatives / self.num_examples)
        log_c = math.log(self.negatives / self.num_examples + self.eps)
        positive = F.softplus(log_c - log_p[..., 0])
        negative = F.softplus(log_p[..., 1:] - log_c) + (log_c - log_noise)
        return (positive + negative.sum(-1)).mean()

    @torch.no_grad()
    def _normalisers(self, scores: Tensor, counts: list[int]) -> Tensor:
        """log Z_s and log Z_t, (2,): the stored ones, or those of all processes' scores (2, B, K + 1)."""
        sums = gather(scores.flatten(1).logsumexp(1)[None], [1] * len(counts)).logsumexp(0)
        fresh = sums - math.log(sum(counts) * scores.shape[2] / self.num_examples)
        # torch.where, because asking whether they are known would mean waiting for the GPU.
        log_z = torch.where(self.log_z_known, self.log_z.float(), fresh)
        if self.training:
            self.log_z.copy_(log_z)
            self.log_z_known.fill_(True)
        return log_z

    @torch.no_grad()
    def _remember(self, v_s: Tensor, v_t: Tensor, index: Tensor, counts: list[int]) -> None:
        index = gather(index, counts)
        for bank, own in ((self.memory_s, v_s), (self.memory_t, v_t)):
            v = gather(own, counts)
            mixed = self.momentum * bank[index].float() + (1 - self.momentum) * v
            bank.index_copy_(0, index, F.normalize(mixed, dim=1).to(bank.dtype))
        self.draws[1] += 1

    @torch.no_grad()
    def _draw_negatives(self, index: Tensor, labels: Tensor | None) -> Tensor:
        """Rows of the bank, (B, K)."""
        n = self.num_examples
        if labels is None:
            pick = self._draw_below(index.new_full((len(index), 1), n - 1))
            return pick + (pick >= index[:, None])
        # Sorted by class, one's own class is a run of rows to jump over.
        known, order = self.labels.sort(stable=True)
        first = torch.searchsorted(known, labels)[:, None]
        own = torch.searchsorted(known, labels, right=True)[:, None] - first
        own = own.masked_fill(own == n, 0)
        pick = self._draw_below(n - own)
        return order[pick + own * (pick >= first)]

    def _draw_below(self, limit: Tensor) -> Tensor:
        """Integers (B, K), uniform below ``limit`` (B, 1), the same on every device.

        A hash of seed, step, rank and place. Unlike a generator's, its state is a buffer that
        goes from device to device, and nothing waits for the GPU to read it.
        """
        seed, step = self.draws
        key = _mix(_mix(_mix(seed) + step) + rank())
        place = torch.arange(len(limit) * self.negatives, device=limit.device)
        bits = _mix(key + place).view(len(limit), self.negatives) >> 33 & 0x7FFFFFFF
        return bits * limit >> 31


_WRAP = 2**64  # int64 holds the constants' bits as negative numbers


def _mix(x: Tensor) -> Tensor:
    """Output number ``x`` of splitmix64 (Steele et al. 2014); int64, overflow intended."""
    x = (x + 1) * (0x9E3779B97F4A7C15 - _WRAP)
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - _WRAP)
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - _WRAP)
    return x ^ (x >> 31 & 0x1FFFFFFFF)
