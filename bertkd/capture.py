"""Pick up Q, K, V and hidden states of chosen blocks while a Hugging Face encoder runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from bertkd._session import REENTRANT, Recording, Session, Stop
from bertkd.encoders import block_list, describe

__all__ = ["Capture", "Recording"]


class Capture:
    """Runs a model and records Q, K, V of some blocks and some hidden states.

    The model keeps its attention implementation (sdpa, flash, flex, eager). It is altered only
    while a call or a ``record`` lasts; afterwards, also after an exception, it is as it was, and
    nothing but the caller's ``Recording`` holds a captured tensor. Captures may be nested, also
    those of one model; the last to be entered is the first to be left. Threads may capture one model:
    they wait for each other, and a plain call of it in another thread meanwhile is not recorded (of a compiled
    model it is not kept apart). The captured q and k give the attention map before dropout.

    A compiled model stays compiled, with one graph for each set of blocks and states asked of it.

    Args:
        model: a Hugging Face encoder (``bertkd.encoders.SUPPORTED``), bare or with a head, also
            compiled or in ``DistributedDataParallel``.
        blocks: blocks whose q, k and v are wanted, from 0 to the number of blocks - 1.
        states: states wanted, from 0 to the number of blocks.
        parts: which of q, k and v of the blocks are kept, as letters; the others' memory is free when the
            model lets go of it.
        instead_of_sdpa: name of a registered attention implementation that a model on SDPA attends with
            while a call or a ``record`` lasts. Not under gradient checkpointing, whose blocks run
            again later and must attend as they did.
        has_pads: the caller knows that the attention mask holds zeros; a model on SDPA then does not look for
            them, for which the host would wait for a GPU. False if it is not known.

    Raises:
        TypeError: the model is no Hugging Face model, or an index no integer.
        UnsupportedEncoderError: the architecture's attention cannot be captured.
        ValueError: an index is out of range, ``parts`` names none of q, k and v, or something else, or the model is
            in ``nn.DataParallel``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Iterable[int] = (),
        states: Iterable[int] = (),
        parts: str = "qkv",
        instead_of_sdpa: str | None = None,
        has_pads: bool = False,
    ) -> None:
        if isinstance(getattr(model, "_orig_mod", model), nn.DataParallel):
            raise ValueError(
                "model is wrapped in nn.DataParallel, whose copies cannot be captured. "
                "Use DistributedDataParallel (torchrun, accelerate launch) or one device."
            )
        num_blocks = describe(model).num_blocks
        self.model = model
        self.blocks = _indices("blocks", blocks, num_blocks - 1)
        self.states = _indices("states", states, num_blocks)
        if not parts or not set(parts) <= set("qkv"):
            raise ValueError(f"parts must be letters of 'qkv', got {parts!r}.")
        self.parts = parts
        self.instead_of_sdpa = instead_of_sdpa
        self.has_pads = has_pads

    def __call__(self, *args: Any, stop_early: bool = False, **kwargs: Any) -> Recording:
        """Run ``model(*args, **kwargs)`` and return what was captured, with the model's output.

        Args:
            stop_early: abandon the forward once the last wanted thing is there, leaving ``output``
                None. Without effect where that cannot be done: nothing is wanted, a compiled or
                distributed model, gradient checkpointing.

        Raises:
            ValueError: the model trains with reentrant gradient checkpointing.
            RuntimeError: something wanted did not come by.
        """
        with self._session(stop_early) as recording, suppress(Stop):
            recording.output = self.model(*args, **kwargs)
        return recording

    def record(self) -> AbstractContextManager[Recording]:
        """Record the one forward that the caller runs in this thread inside the ``with`` statement.

        Raises (inside the statement, or on leaving it):
            ValueError: the model trains with reentrant gradient checkpointing.
            RuntimeError: the model ran twice, or something wanted did not come by.
        """
        return self._session(stop=False)

    @contextmanager
    def _session(self, stop: bool) -> Iterator[Recording]:
        blocks = block_list(self.model)
        checkpointing = [
            block._gradient_checkpointing_func
            for block in blocks
            if block.training and getattr(block, "gradient_checkpointing", False)
        ]
        _refuse_reentrant(checkpointing)
        instead = self.instead_of_sdpa
        if instead is not None and (checkpointing or _has_checkpoint_wrapper(self.model)):
            instead = None
        # An abandoned forward would leave a distributed wrapper in the middle of its bookkeeping,
        # and a checkpoint with its hooks on saved tensors.
        stop = stop and not checkpointing and not is_distributed(self.model)
        session = Session(self.blocks, self.states, stop, instead, self.parts, self.has_pads)
        try:
            session.attach(self.model)
            yield session.recording
        finally:
            session.detach()
        if missing := session.missing():
            raise RuntimeError(
                f"not captured: {', '.join(missing)}. Either the model was not run in this thread, or "
                "its attention does not go through transformers' AttentionInterface."
            )


def _refuse_reentrant(checkpointing: Iterable[Any]) -> None:
    if not torch.is_grad_enabled():
        return
    for function in checkpointing:
        # Checkpointing is reentrant unless it is told not to be.
        if getattr(function, "keywords", {}).get("use_reentrant") is not False:
            raise ValueError(REENTRANT)


def _has_checkpoint_wrapper(model: nn.Module) -> bool:
    """Whether PyTorch's own ``checkpoint_wrapper`` (FSDP's way of checkpointing) is around some module of ``model``."""
    return torch.is_grad_enabled() and any(
        type(module).__name__ == "CheckpointWrapper" for module in model.modules()
    )


def is_distributed(model: nn.Module) -> bool:
    """Whether ``model`` or something in it is in ``DistributedDataParallel`` or sharded by FSDP's ``fully_shard``."""
    # Without a group of processes there is nothing to look for.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    kinds = {type(module) for module in model.modules()}
    # By name, so that FSDP need not be imported.
    return any(
        cls.__name__ in ("FSDPModule", "DistributedDataParallel")
        for kind in kinds
        for cls in kind.__mro__
    )


def nothing_of(output: Any) -> Tensor | float:
    """0 that depends on a network's output: FSDP gathers weights anew once a gradient reaches what a module returned.

    That of a captured tensor reaches the insides of modules only.
    """
    values = output.values() if isinstance(output, Mapping) else output
    tensors = (value for value in values if isinstance(value, Tensor) and value.requires_grad)
    return next((0.0 * tensor.flatten()[0] for tensor in tensors), 0.0)


def _indices(argument: str, values: Iterable[int], last: int) -> frozenset[int]:
    try:
        indices = frozenset(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(
            f"{argument} must be whole numbers such as [0, 2], got {values!r}"
        ) from None
    wrong = sorted(i for i in indices if not 0 <= i <= last)
    if wrong:
        note = " (state 0 is the embedding output, state i + 1 the output of block i)"
        raise ValueError(
            f"{argument} must lie in 0..{last}, got {', '.join(map(str, wrong))}"
            + (note if argument == "states" else "")
        )
    return indices
