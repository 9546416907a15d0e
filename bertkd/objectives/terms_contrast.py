"""Contrastive distillation on first tokens: Hid-CLS-Contrast (CRD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertkd.contrast import InBatchContrast, MemoryBankContrast, QueueContrast
from bertkd.errors import unknown_name
from bertkd.layer_maps import MapSpec, format_pairs, is_random, state_pairs
from bertkd.objectives.base import (
    Memory,
    Needs,
    Setup,
    Shape,
    StepContext,
    Term,
    register_term,
)
from bertkd.objectives.options import positive

_CLASSES: dict[str, type[nn.Module]] = {
    "bank": MemoryBankContrast,
    "batch": InBatchContrast,
    "queue": QueueContrast,
}


@register_term
class HidCLSContrast(Term):
    """Contrast of the first tokens' states, joined over all states of each side.

    ``mode`` "bank" keeps an embedding of every training example (needs ``num_examples`` and
    ``batch["index"]``); "batch" and "queue" need neither. ``map`` "all" joins every state, anything
    else the states of its pairs. Class labels in the batch keep examples of one class from being each
    other's negatives. Sequences of pads only are left out, but in graphs (torch.compile, CUDA graphs), whose sizes are
    fixed. ``@released`` is the bank with the paper's settings.

    Source: Tian et al. 2020 (CRD); the paper's Hid-CLS-Contrast.
    """

    kind: ClassVar[str] = "hid_cls_contrast"
    RELEASED: ClassVar[Mapping[str, Any]] = {
        "mode": "bank",
        "map": "all",
        "dim": 128,
        "temperature": 0.07,
        "momentum": 0.5,
        "negatives": 100,
    }

    def __init__(
        self,
        setup: Setup,
        *,
        mode: str = "bank",
        map: MapSpec = "all",
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float | None = None,
        negatives: int | None = None,
        queue_size: int | None = None,
    ) -> None:
        """Make the embeddings and the store of negatives.

        Raises:
            TypeError: a size that is no whole number.
            ValueError: an unknown mode, a bank without ``num_examples``, a map out of range, or an
                option that the mode does not have.
        """
        super().__init__()
        if mode not in _CLASSES:
            raise unknown_name("mode", str(mode), _CLASSES)
        if is_random(map):
            raise ValueError("hid_cls_contrast has no random map: its features have fixed places")
        if map == "all":
            self.states = tuple(tuple(range(n + 1)) for n in setup.depths)
            self._map = "all states joined"
        else:
            pairs = state_pairs(map, *setup.depths)
            self.states = tuple(tuple(sorted(set(side))) for side in zip(*pairs, strict=True))
            self._map = format_pairs(pairs)
        self.mode = mode
        self.sizes = tuple(
            len(states) * side.spec.hidden_size
            for states, side in zip(self.states, (setup.student, setup.teacher), strict=True)
        )
        own = {"bank": ("momentum", "negatives"), "batch": (), "queue": ("queue_size",)}[mode]
        given: dict[str, Any] = {
            "momentum": momentum,
            "negatives": negatives,
            "queue_size": queue_size,
        }
        extra = {name: value for name, value in given.items() if value is not None}
        for name in extra:
            if name not in own:
                raise ValueError(f"{name} does nothing in mode={mode!r}; leave it out")
        options: dict[str, Any] = {
            "d_s": self.sizes[0],
            "d_t": self.sizes[1],
            "dim": dim,
            "temperature": positive("temperature", temperature),
            "seed": setup.seed,
            **extra,
        }
        if mode == "bank":
            if setup.num_examples is None:
                raise ValueError(
                    "mode='bank' keeps an entry per training example: pass num_examples (and a column "
                    "'index' in each batch), or use mode='queue' or mode='batch'"
                )
            options["num_examples"] = setup.num_examples
        self.contrast: nn.Module = _CLASSES[mode](**options)

    def needs(self) -> Needs:
        """The joined states, and the examples' numbers where there is a bank."""
        ours, theirs = (frozenset(states) for states in self.states)
        return Needs(student_states=ours, teacher_states=theirs, index=self.mode == "bank")

    def forward(self, step: StepContext) -> Tensor:
        """The loss; in training mode the store of negatives is renewed."""
        ours, theirs = (
            torch.cat([step.first_token(side.states[i]) for i in states], -1)
            for side, states in zip((step.student, step.teacher), self.states, strict=True)
        )
        index, labels = step.batch.get("index"), step.batch.get("labels")
        # Labels per token say nothing about the sequence.
        labels = labels if labels is not None and labels.ndim == 1 else None
        rows = _examples(step)
        if rows is None:
            return self.contrast(ours, theirs, index=index, labels=labels)
        # Where there is none, one stands in for nothing: processes wait for each other in here.
        worth, rows = float(len(rows) > 0), rows if len(rows) else rows.new_zeros(1)
        ours, theirs = (x[rows.to(x.device)] for x in (ours, theirs))
        index, labels = (None if x is None else x[rows.to(x.device)] for x in (index, labels))
        return worth * self.contrast(ours, theirs, index=index, labels=labels)

    def memory(self, shape: Shape) -> Memory:
        """The joined features, and the stored embeddings: there is nothing to fuse."""
        stored = sum(buffer.numel() * buffer.element_size() for buffer in self.contrast.buffers())
        size = 4 * shape.batch * sum(self.sizes) + stored
        return Memory(size, size)

    def map_text(self) -> str:
        """The states joined."""
        return self._map


def _examples(step: StepContext) -> Tensor | None:
    """Numbers of the sequences with a real token; None for all."""
    real = step.examples
    if real is None or torch.compiler.is_compiling():
        return None
    if real.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return real.nonzero()[:, 0]
