"""Everything a model returns for a tiny batch, as a flat list."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tiny_models import tiny_batch
from torch import Tensor, nn


def tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output.to_tuple() if hasattr(output, "to_tuple") else output:
            yield from tensors(part)


def outputs(model: nn.Module, **batch_options) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(model(**tiny_batch(model, **batch_options), output_hidden_states=True)))
