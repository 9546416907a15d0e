"""What the contrasts share: embeddings onto the unit sphere, checks, and other processes' rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bertkd.errors import whole_number


class Contrast(nn.Module, ABC):
    """Embeds both sides' features linearly and hands unit vectors to ``_loss``.

    Args:
        d_s: width of the student's features.
        d_t: width of the teacher's features.
        dim: width of the embeddings.
        temperature: divides the scores.
        generator: CPU generator that the embeddings are drawn from.

    Raises:
        TypeError: for sizes that are no whole numbers.
        ValueError: for sizes below 1 or a temperature that is not positive.
    """

    def __init__(
        self, d_s: int, d_t: int, *, dim: int, temperature: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        for name, value in (("d_s", d_s), ("d_t", d_t), ("dim", dim)):
            whole_number(name, value, least=1)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.embed_s = _linear(d_s, dim, generator)
        self.embed_t = _linear(d_t, dim, generator)

    def forward(
        self,
        f_s: Tensor,
        f_t: Tensor,
        *,
        index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; in training mode the stored negatives are renewed too.

        Args:
            f_s: student features, (B, d_s), any floating dtype.
            f_t: teacher features, (B, d_t); they get no gradient.
            index: the examples' numbers in the training set, (B,) integers from 0.
            labels: classes, (B,) integers from 0: examples of one class are no negatives of each
                other. Floating-point labels (regression, multi-label) are ignored.

        Returns:
            A scalar in fp32. Gradients reach ``f_s`` and both embeddings.

        Raises:
            ValueError: for shapes that do not fit, and for numbers out of range in CPU tensors.
        """
        index, labels = self._check(f_s, f_t, index, labels)
        # Scores reach 1 / temperature, whose exponential fp16 cannot hold.
        with torch.autocast(f_s.device.type, enabled=False):
            v_s = F.normalize(linear_float32(self.embed_s, f_s), dim=1)
            v_t = F.normalize(linear_float32(self.embed_t, f_t.detach()), dim=1)
            return self._loss(v_s, v_t, index, labels)

    @abstractmethod
    def _loss(
        self, v_s: Tensor, v_t: Tensor, index: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """The loss of unit vectors, (B, dim) in fp32, with what `_check` returned."""

    def _check(
        self, f_s: Tensor, f_t: Tensor, index: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Refuse what does not fit; returns ``index`` and class ``labels`` as int64."""
        for name, f, layer in (("f_s", f_s, self.embed_s), ("f_t", f_t, self.embed_t)):
            if f.ndim != 2 or f.shape[1] != layer.in_features or f.shape[0] == 0:
                raise ValueError(
                    f"{name} must be (B, {layer.in_features}) with B >= 1, got {tuple(f.shape)}: "
                    "give one vector per example, such as its first token's states"
                )
        if len(f_s) != len(f_t):
            raise ValueError(f"f_s has {len(f_s)} examples but f_t has {len(f_t)}")
        if labels is not None and labels.is_floating_point():
            labels = None
        return _whole_numbers("index", index, f_s), _whole_numbers("labels", labels, f_s)


def _whole_numbers(name: str, numbers: Tensor | None, f_s: Tensor) -> Tensor | None:
    if numbers is None:
        return None
    if numbers.shape != f_s.shape[:1] or numbers.is_floating_point():
        raise ValueError(
            f"{name} must be one integer per example, ({len(f_s)},), got "
            f"{tuple(numbers.shape)} of {numbers.dtype}; leave it out if there is none"
        )
    # Asking the GPU would mean waiting for it.
    if numbers.device.type == "cpu" and int(numbers.min()) < 0:
        raise ValueError(
            f"{name} must not be negative, got {int(numbers.min())}; leave it out if there is none"
        )
    return numbers.to(f_s.device, torch.long)


def world_size() -> int:
    """Number of processes training together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def row_counts(x: Tensor) -> list[int]:
    """Rows of ``x`` in every process: the last batch of an epoch may not be divisible by their number."""
    if world_size() == 1:
        return [len(x)]
    counts = [torch.empty(1, dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    return torch.cat(counts).tolist()


def gather(x: Tensor, counts: list[int]) -> Tensor:
    """Concatenate ``x`` of all processes along dim 0; only this one's part carries a gradient.

    ``counts`` are everyone's `row_counts`; the other dimensions must agree.
    """
    if len(counts) == 1:
        return x
    # A collective takes one shape from all.
    own = x.new_zeros(max(counts), *x.shape[1:])
    own[: len(x)] = x.detach()
    parts = [torch.empty_like(own) for _ in counts]
    dist.all_gather(parts, own)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[rank()] = x
    return torch.cat(parts)


def _linear(d_in: int, d_out: int, generator: torch.Generator) -> nn.Linear:
    """PyTorch's default initialisation, drawn from ``generator``."""
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out)
    bound = 1 / math.sqrt(d_in)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` in float32, whatever dtype its module was moved to."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())
