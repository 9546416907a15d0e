"""The loss of a training step, twice: without bertkd and with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertkd.bench.ops_attention import kl_of_maps
from bertkd.bench.step_models import PAIRS

if TYPE_CHECKING:
    from bertkd import Distiller

Batch = Mapping[str, Tensor]
StepLoss = Callable[[Batch], Tensor]


def ours(
    name: str, teacher: Any, student: Any, impl: str, pairs: Sequence[tuple[int, int]]
) -> Distiller:
    """A Distiller; on a CPU with ``impl="native"`` with bertkd's attention in both networks, else SDPA."""
    import bertkd

    pair = PAIRS[name]
    objective = pair.objective.format(*pairs[0], pair.relation_heads)
    return bertkd.Distiller(teacher, student, objective, layer_map=list(pairs), impl=impl)


def eager(name: str, teacher: Any, student: Any, pairs: Sequence[tuple[int, int]]) -> StepLoss:
    """What one writes without bertkd, for the objective of the pair."""
    heads = PAIRS[name].relation_heads
    if heads is not None:
        return lambda batch: _relations(teacher, student, batch, pairs, heads)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    return lambda batch: _maps(teacher, student, batch, pairs)


def _maps(teacher: Any, student: Any, batch: Batch, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """``output_attentions=True`` keeps the maps of every block of both networks."""
    with _teachers_own(batch):
        maps_t = teacher(**batch, output_attentions=True).attentions
    maps_s = student(**batch, output_attentions=True).attentions
    mask = batch["attention_mask"].bool()
    rows = mask.sum() * maps_s[0].shape[1]
    losses = [kl_of_maps(maps_s[s], maps_t[t], mask) for s, t in pairs]
    return torch.stack(losses).sum() / rows


@contextmanager
def _teachers_own(batch: Batch):
    """No gradients, and no autocast, whose casts a teacher in half precision is spared by a Distiller too."""
    with torch.no_grad(), torch.autocast(batch["input_ids"].device.type, enabled=False):
        yield


def _relations(teacher: Any, student: Any, batch: Batch, pairs: Sequence, heads: int) -> Tensor:
    """The three relations' losses from the projections' outputs, which hooks pick up."""
    with _projections(teacher, [t for _, t in pairs]) as found_t, _teachers_own(batch):
        teacher(**batch)
    with _projections(student, [s for s, _ in pairs]) as found_s:
        student(**batch)
    mask = batch["attention_mask"].bool()
    rows = mask.sum() * heads
    losses = [
        kl_of_maps(
            _relation(found_s[s, part], heads, mask), _relation(found_t[t, part], heads, mask), mask
        )
        for s, t in pairs
        for part in ("query", "key", "value")
    ]
    return torch.stack(losses).sum() / rows


def _relation(x: Tensor, heads: int, mask: Tensor) -> Tensor:
    batch, length, width = x.shape
    x = x.view(batch, length, heads, width // heads).transpose(1, 2)
    scores = (x @ x.transpose(-1, -2) * (width // heads) ** -0.5).float()
    return torch.softmax(scores.masked_fill(~mask[:, None, None, :], float("-inf")), -1)


@contextmanager
def _projections(model: Any, blocks: Sequence[int]):
    """Outputs of the query, key and value projections of some blocks, by hooks."""
    found: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as stack:
        for block in blocks:
            attention = model.encoder.layer[block].attention.self
            for part in ("query", "key", "value"):

                def keep(module, args, output, where=(block, part)):
                    found[where] = output

                handle = getattr(attention, part).register_forward_hook(keep)
                stack.callback(handle.remove)
        yield found
