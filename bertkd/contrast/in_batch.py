"""Contrast within the batch."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkd.contrast.base import Contrast, gather, row_counts


class InBatchContrast(Contrast):
    """InfoNCE in both directions, with the other examples of the batch as negatives.

        scores = v_s @ v_t.T / temperature
        loss = (cross_entropy(scores, arange(B)) + cross_entropy(scores.T, arange(B))) / 2

    Examples with the same ``index`` or the same integer label are left out of each other's sums. A
    batch of 1 has no negatives: the loss is 0, with a warning. With ``gather``, training uses the
    examples of all processes. The loss is then the same on all of them, and scaled so that the mean of
    the gradients, as DDP takes it, is the gradient of that loss.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding".

    Args:
        d_s: width of the student's features.
        d_t: width of the teacher's features.
        dim: width of the embeddings.
        temperature: divides the scores.
        gather: use the examples of all processes.
        seed: fixes the embeddings; the global random state is not used.

    Raises:
        ValueError: for sizes below 1 or a temperature that is not positive.
    """

    def __init__(
        self,
        d_s: int,
        d_t: int,
        *,
        dim: int = 128,
        temperature: float = 0.07,
        gather: bool = True,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(d_s, d_t, dim=dim, temperature=temperature, generator=generator)
        self.gather = gather

    def _loss(
        self, v_s: Tensor, v_t: Tensor, index: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        counts = row_counts(v_s) if self.gather and self.training else [len(v_s)]
        world = len(counts)
        keys = [gather(key, counts) for key in (index, labels) if key is not None]
        v_s, v_t = gather(v_s, counts), gather(v_t, counts)
        if len(v_s) < 2:
            # No error: what is left of the data for an epoch's last update may be one example.
            warnings.warn(
                "a batch of 1 has no negatives, so InBatchContrast gives 0 for it: where all are that small use "
                "larger batches or QueueContrast (mode='queue')",
                stacklevel=2,
            )
        blocked = torch.zeros(len(v_s), len(v_s), dtype=torch.bool, device=v_s.device)
        for key in keys:
            blocked |= key[:, None] == key
        blocked.fill_diagonal_(False)
        scores = (v_s @ v_t.T / self.temperature).masked_fill(blocked, -torch.inf)
        own = torch.arange(len(v_s), device=v_s.device)
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        # Each process differentiates its own rows only, and DDP divides by their number.
        return world * loss - (world - 1) * loss.detach()
