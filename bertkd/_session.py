"""One forward being recorded: listeners on a model's modules fill a ``Recording``."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bertkd._attention import LISTENERS, intercept, lock_of
from bertkd.encoders import attention_modules, base_model, block_list, last_norm, projections

# A module's listeners to the start of its forward, to its input and to its output.
_STARTS = "_bertkd_start_listeners"
_INPUTS = "_bertkd_input_listeners"
_OUTPUTS = "_bertkd_output_listeners"

REENTRANT = (
    "reentrant gradient checkpointing hides gradients from captured tensors. Use "
    'model.gradient_checkpointing_enable({"use_reentrant": False}), or of PyTorch\'s checkpoint_wrapper '
    "checkpoint_impl=CheckpointImpl.NO_REENTRANT."
)


@dataclass(repr=False, eq=False)
class Recording:
    """What was captured in one forward; dicts are keyed by block index, ``states`` by state index.

    Attributes:
        q: queries (B, H, L, D) as handed to attention: after rotary embedding, before scaling. Of encoders that add
            relative positions to the scores (DeBERTa, MPNet) as projected.
        k: keys, likewise. May be views of larger tensors, as ``q`` and ``v`` may.
        v: values, likewise.
        scale: the softmax scale; the block's map is ``softmax(q @ k.mT * scale + mask)``, where
            `bertkd.encoders.EncoderSpec.has_maps`.
        window: how many tokens to either side the block attends to; None where to all.
        states: hidden states (B, L, d). State 0 is the input of block 0, state i + 1 the output of
            block i. The last one is taken after the final norm where there is one (ModernBERT), as
            ``output_hidden_states`` does.
        output: what the model returned; None if it was stopped early or run by ``record``'s caller.
    """

    q: dict[int, Tensor] = field(default_factory=dict)
    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)
    window: dict[int, int | None] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    output: Any = None


class Stop(BaseException):
    """Ends a forward of which nothing more is wanted; no model catches it by accident."""


class Session:
    """One ``Recording``, what is wanted in it, whether to stop once that is there, and what stands in for SDPA.

    ``parts`` of a block are those of q, k and v that are worth keeping; ``has_pads`` is as for ``intercept``.
    """

    def __init__(
        self,
        blocks: frozenset[int],
        states: frozenset[int],
        stop: bool,
        instead_of_sdpa: str | None,
        parts: str,
        has_pads: bool,
    ) -> None:
        self.recording = Recording()
        self.blocks, self.states, self.parts = blocks, states, parts
        self.stop = stop
        self.instead_of_sdpa, self.has_pads = instead_of_sdpa, has_pads
        self.started = False
        self._grad = False
        self._thread = 0
        self._undo = ExitStack()

    # Not for torch.compile to trace, when a caller around the capture is compiled.
    @torch.compiler.disable
    def attach(self, model: nn.Module) -> None:
        """Set the listeners on ``model``.

        All modules are listened to, wanted or not: a compiled graph is reused only where all that
        it read while being traced is the same, and so it must have read what is wanted.
        """
        self._thread = threading.get_ident()
        undo = self._undo
        base, blocks = base_model(model), block_list(model)
        if (own := projections(model)) is None:
            self._listen_to_interface(attention_modules(model))
        else:
            self._listen_to_projections(attention_modules(model), own, base.config)
        _listen(undo, base, _STARTS, self.begin)

        outputs = _places(blocks, first=1)
        if (norm := last_norm(model)) is not None:
            outputs |= {blocks[-1]: (), norm: (len(blocks),)}
        _listen(undo, blocks[0], _INPUTS, _StateTap(self, (0,)))
        for module, indices in outputs.items():
            _listen(undo, module, _OUTPUTS, _StateTap(self, indices))

    def _listen_to_interface(self, attentions: list[nn.Module]) -> None:
        configs: dict[int, Any] = {id(module.config): module.config for module in attentions}
        for config in configs.values():
            self._undo.enter_context(intercept(config, self.instead_of_sdpa, self.has_pads))
        for module, indices in _places(attentions).items():
            _listen(self._undo, module, LISTENERS, _AttentionTap(self, indices))

    def _listen_to_projections(
        self, attentions: list[nn.Module], names: tuple[str, str, str], config: Any
    ) -> None:
        self._undo.enter_context(lock_of(config))
        for module, indices in _places(attentions).items():
            tap = _ProjectionsTap(self, indices, config.num_attention_heads)
            _listen(self._undo, module, _STARTS, tap.begin)
            for name, listener in zip(names, (tap.note_q, tap.note_k, tap.note_v), strict=True):
                _listen(self._undo, getattr(module, name), _OUTPUTS, listener)

    @torch.compiler.disable
    def detach(self) -> None:
        """Leave the model as it was before ``attach``."""
        self._undo.close()

    def is_elsewhere(self) -> bool:
        """Whether this is a call in another thread, which is not the forward to record; compiled graphs cannot tell."""
        return not torch.compiler.is_compiling() and threading.get_ident() != self._thread

    def begin(self) -> None:
        if self.is_elsewhere():
            return
        if self.started:
            raise RuntimeError(
                "the model ran twice inside one record(); a Recording holds one forward. "
                "Open a new record() for each."
            )
        self.started = True
        self._grad = torch.is_grad_enabled()

    def note_attention(self, block: int, q: Tensor, k: Tensor, v: Tensor, kwargs: dict) -> None:
        if block not in self.blocks:
            return
        self._refuse_hidden_gradients()
        scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
        recording = self.recording
        for part, tensor in (("q", q), ("k", k), ("v", v)):
            if part in self.parts:
                getattr(recording, part)[block] = tensor
        recording.scale[block] = q.shape[-1] ** -0.5 if scale is None else scale
        # Implementations are handed one more than the mask allows.
        recording.window[block] = None if window is None else window - 1
        self._stop_if_complete()

    def note_state(self, index: int, state: Tensor) -> None:
        if index in self.states:
            self._refuse_hidden_gradients()
            self.recording.states[index] = state
            self._stop_if_complete()

    def missing(self) -> list[str]:
        """Name what is wanted and has not come by."""
        recording = self.recording
        blocks = [f"block {i}" for i in sorted(self.blocks - recording.scale.keys())]
        return blocks + [f"state {i}" for i in sorted(self.states - recording.states.keys())]

    def _refuse_hidden_gradients(self) -> None:
        # Reentrant checkpoints run what they hold without gradients, whoever has set them.
        if self._grad and not torch.is_grad_enabled():
            raise ValueError(REENTRANT)

    def _stop_if_complete(self) -> None:
        # A compiled graph cannot be left midway.
        if self.stop and not torch.compiler.is_compiling() and not self.missing():
            raise Stop


class _Tap:
    """Knows which block a call of a module is: a shared module runs as several, in order."""

    def __init__(self, session: Session, indices: tuple[int, ...]) -> None:
        self.session, self.indices = session, indices
        self.calls = 0

    def next_index(self) -> int | None:
        # A checkpointed block runs again in the backward: of an earlier forward before this one
        # has started, of this one beyond the last call.
        if not self.session.started or self.calls == len(self.indices):
            return None
        if self.session.is_elsewhere():
            return None
        self.calls += 1
        return self.indices[self.calls - 1]


class _AttentionTap(_Tap):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict) -> None:
        if (index := self.next_index()) is not None:
            self.session.note_attention(index, query, key, value, kwargs)


class _ProjectionsTap(_Tap):
    """Hears what the three projections of an attention module make of the states.

    That is what each gives first: DeBERTa runs two of them again, on its relative positions.
    """

    def __init__(self, session: Session, indices: tuple[int, ...], heads: int) -> None:
        super().__init__(session, indices)
        self.heads = heads
        self.index: int | None = None
        self.found: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.index, self.found = self.next_index(), {}

    def note_q(self, output: Tensor) -> None:
        self._note("q", output)

    def note_k(self, output: Tensor) -> None:
        self._note("k", output)

    def note_v(self, output: Tensor) -> None:
        self._note("v", output)

    def _note(self, part: str, output: Tensor) -> None:
        if self.index is None or part in self.found:
            return
        self.found[part] = output.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if len(self.found) == 3:
            q, k, v = (self.found[name] for name in "qkv")
            self.session.note_attention(self.index, q, k, v, {})


class _StateTap(_Tap):
    def __call__(self, state: Tensor) -> None:
        if (index := self.next_index()) is not None:
            self.session.note_state(index, state)


def _places(modules: Iterable[nn.Module], first: int = 0) -> dict[nn.Module, tuple[int, ...]]:
    """Where each module stands among ``modules``, counted from ``first``; a shared one in several places."""
    places: dict[nn.Module, tuple[int, ...]] = {}
    for index, module in enumerate(modules, first):
        places[module] = (*places.get(module, ()), index)
    return places


def _listen(undo: ExitStack, module: nn.Module, kind: str, listener: Any) -> None:
    """Add ``listener`` to those of ``kind`` that ``module`` has; ``undo`` takes it off."""
    attributes = vars(module)
    before = attributes.get(kind, ())
    attributes[kind] = (*before, listener)
    if before:
        undo.callback(attributes.__setitem__, kind, before)
        return
    undo.callback(attributes.__delitem__, kind)
    if kind == _STARTS:
        undo.callback(module.register_forward_pre_hook(_on_start).remove)
    elif kind == _INPUTS:
        undo.callback(module.register_forward_pre_hook(_on_input, with_kwargs=True).remove)
    elif kind == _OUTPUTS:
        undo.callback(module.register_forward_hook(_on_output).remove)


# Hooks are functions of the file, not closures, so that torch.compile can reuse its graphs.
def _on_start(module: nn.Module, args: tuple) -> None:
    for listener in getattr(module, _STARTS, ()):
        listener()


def _on_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
    for listener in getattr(module, _INPUTS, ()):
        listener(args[0] if args else kwargs["hidden_states"])


def _on_output(module: nn.Module, args: tuple, output: Any) -> None:
    for listener in getattr(module, _OUTPUTS, ()):
        listener(output[0] if isinstance(output, tuple) else output)
