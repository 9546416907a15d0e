"""Contrast with a queue of past teacher embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkd.contrast.base import Contrast, gather, row_counts
from bertkd.errors import whole_number


class QueueContrast(Contrast):
    """InfoNCE against the teacher's embeddings of this and of past batches.

        keys = cat([v_t, queue])
        loss = cross_entropy(v_s @ keys.T / temperature, arange(B))

    Keys with the example's ``index`` or its integer label are left out, its own excepted. In
    training ``v_t`` then takes the place of the oldest keys. At first the queue holds random unit
    vectors. Its memory does not depend on the size of the training set, and a batch may have size
    1. Across processes the keys of all are queued.

    Source: the queue is that of He et al. 2020, "Momentum Contrast".

    Args:
        d_s: width of the student's features.
        d_t: width of the teacher's features.
        queue_size: how many past embeddings to keep.
        dim: width of the embeddings.
        temperature: divides the scores.
        seed: fixes the embeddings and the first queue; the global random state is not used.

    Raises:
        ValueError: for sizes below 1 or a temperature that is not positive.
    """

    queue: Tensor
    queue_index: Tensor
    queue_labels: Tensor
    oldest: Tensor

    def __init__(
        self,
        d_s: int,
        d_t: int,
        queue_size: int = 4096,
        *,
        dim: int = 128,
        temperature: float = 0.07,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(d_s, d_t, dim=dim, temperature=temperature, generator=generator)
        whole_number("queue_size", queue_size, least=1)
        self.queue_size = queue_size
        start = torch.empty(queue_size, dim, device="cpu").normal_(generator=generator)
        self.register_buffer("queue", F.normalize(start, dim=1))
        self.register_buffer("queue_index", torch.full((queue_size,), -1))
        self.register_buffer("queue_labels", torch.full((queue_size,), -1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def _loss(
        self, v_s: Tensor, v_t: Tensor, index: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        keys = torch.cat([v_t, self.queue.float()])
        blocked = torch.zeros(len(v_s), len(keys), dtype=torch.bool, device=v_s.device)
        for own, past in ((index, self.queue_index), (labels, self.queue_labels)):
            if own is not None:
                blocked |= own[:, None] == torch.cat([own, past])
        blocked.fill_diagonal_(False)
        scores = (v_s @ keys.T / self.temperature).masked_fill(blocked, -torch.inf)
        if self.training:
            self._push(v_t, index, labels)
        return F.cross_entropy(scores, torch.arange(len(v_s), device=v_s.device))

    @torch.no_grad()
    def _push(self, v_t: Tensor, index: Tensor | None, labels: Tensor | None) -> None:
        counts = row_counts(v_t)
        keys = gather(v_t, counts)
        places = (self.oldest + torch.arange(len(keys), device=keys.device)) % self.queue_size
        # index_copy_ wants each place once: of more keys than there are places the last stay.
        places = places[-self.queue_size :]
        self.queue.index_copy_(0, places, keys[-self.queue_size :].to(self.queue.dtype))
        for numbers, queue in ((index, self.queue_index), (labels, self.queue_labels)):
            if numbers is None:
                queue.index_fill_(0, places, -1)
            else:
                queue.index_copy_(0, places, gather(numbers, counts)[-self.queue_size :])
        self.oldest.add_(len(keys)).remainder_(self.queue_size)
