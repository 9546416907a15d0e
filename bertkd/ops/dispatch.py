"""Which implementation runs an op, and why.

Two steps. ``requested`` reads the caller's wish and looks at no tensor, so that ``torch.compile`` can trace it.
``resolve`` turns "auto" into an implementation inside the op, where the tensors are real and the answer may depend on
their device, dtype and shape.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.errors import unknown_name
from bertkd.ops import verify
from bertkd.ops.implementations import IMPLS, implementation, unavailable, warn_once
from bertkd.ops.tensors import float_tensors, has_mask

ENVIRONMENT_VARIABLE = "BERTKD_IMPL"

# What "auto" prefers to the portable default, by type of device. "cuda" is never chosen: on an H200
# Triton's kernels are faster at every length (docs/gpu.md).
PREFERRED = {"cpu": "native", "cuda": "triton"}

# GPU models (``torch.cuda.get_device_name``) on which these very kernels have passed their tests. On any other one
# "auto" uses a Triton kernel only after it has agreed with chunked on a small case.
PROVEN_GPUS: frozenset[str] = frozenset()


class Choice(NamedTuple):
    """An implementation and the reason for it, as ``explain`` prints it."""

    impl: str
    reason: str


def requested(impl: str = "auto", eager_only: str | None = None) -> str:
    """The implementation asked for, by the argument or else by ``BERTKD_IMPL``; may still be "auto".

    Args:
        impl: the caller's wish.
        eager_only: the argument that only ``eager`` implements, if the caller gave one.

    Raises:
        ValueError: for an unknown ``impl``, or one that lacks ``eager_only``.
    """
    if impl == "auto":
        impl = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if impl == "auto":
        return "auto" if eager_only is None else "eager"
    if impl not in IMPLS:
        raise unknown_name("impl", impl, ("auto", *IMPLS))
    if eager_only is not None and impl != "eager":
        raise ValueError(
            f"impl={impl!r} does not implement {eager_only}, which reproduces the released code. "
            f"Use impl='eager' (or 'auto'), or leave {eager_only} out for the exact loss."
        )
    return impl


def resolve(
    op: str, impl: str, tensors: Sequence[Tensor], form: str = "fwd_bwd", masked: bool = True
) -> Choice:
    """Decide what runs ``op`` on these tensors.

    Args:
        op: stem of the op, e.g. ``"relation_kl"``.
        impl: what ``requested`` gave.
        tensors: the op's floating-point tensors in order; the first one's device decides for "auto".
        form: which of the op's forms is to run; each has kernels of its own to be checked.
        masked: whether there is a mask of keys; without one, other kernels run.

    Raises:
        ValueError: for an ``impl`` asked for by name that cannot run here or not on these tensors.
    """
    if impl in ("eager", "chunked"):
        return Choice(impl, f"asked for as {impl}")
    device = tensors[0].device.type
    if impl != "auto":
        reason = unavailable(impl) or implementation(impl).refusal(op, tensors)
        if reason is not None:
            raise ValueError(
                f"impl={impl!r} cannot run {op}: {reason}. Use impl='auto' or 'chunked'."
            )
        return Choice(impl, f"asked for as {impl}")
    preferred = PREFERRED.get(device)
    if preferred is None:
        return Choice("chunked", f"the portable default on {device}")
    reason = unavailable(preferred) or implementation(preferred).refusal(op, tensors)
    if reason is None and preferred == "triton":
        reason = _unproven(op, tensors, form, masked)
    if reason is None:
        return Choice(preferred, f"the fastest on {device}")
    if device == "cuda" and not any(x.dtype == torch.float64 for x in tensors):
        warn_once(f"bertkd runs {op} on {device} by its portable implementation: {reason}.")
    return Choice("chunked", f"the portable default; {preferred} is out: {reason}")


def _unproven(op: str, tensors: Sequence[Tensor], form: str, masked: bool) -> str | None:
    """Why a Triton kernel may not run unasked on this GPU: unmeasured there, and not yet seen to be right."""
    if torch.cuda.get_device_name(tensors[0].device) in PROVEN_GPUS:
        return None
    return verify.disagreement(op, "triton", tensors, form, masked)


# A loss is not always an op of its own.
_OP_OF_LOSS = {
    "attention_kl": "relation_kl",
    "value_relation_kl": "self_relation_kl",
    "logit_kl": "softmax_kl",
}

# Shapes of an op's tensors as a base-sized BERT has them, for when nobody gives any.
_HEADS, _STATES, _LOGITS, _DECODER = (8, 12, 128, 64), (1024, 768), (64, 30522), (30522, 768)
_TYPICAL: dict[str, list[tuple[int, ...]]] = {
    "relation_kl": [_HEADS] * 4,
    "self_relation_kl": [_HEADS] * 2,
    "attention_mse": [_HEADS] * 4,
    "window_relation_kl": [_HEADS] * 4,
    "window_attention_mse": [_HEADS] * 4,
    "hidden_mse": [_STATES] * 2,
    "hidden_proj_mse": [_STATES, (768, 768), _STATES],
    "hidden_combine_mse": [_STATES, (768, 1536), _STATES, _STATES],
    "hidden_cosine": [_STATES] * 2,
    "softmax_kl": [_LOGITS] * 2,
    "linear_kl": [_STATES, _DECODER] * 2,
}


def op_of_loss(name: str) -> str:
    """The op behind a loss, by its stem: ``"attention_kl"`` -> ``"relation_kl"``.

    Raises:
        ValueError: for a name that is neither a loss nor an op, suggesting the nearest.
    """
    if name not in _OP_OF_LOSS and name not in _TYPICAL:
        raise unknown_name("loss", name, {*_OP_OF_LOSS, *_TYPICAL})
    return _OP_OF_LOSS.get(name, name)


def explain(
    op: str,
    *tensors: Tensor | Sequence[Tensor] | None,
    impl: str = "auto",
    device: torch.device | str = "cpu",
) -> str:
    """Say in one line which implementation would run ``op`` on these tensors, and why.

    Args:
        op: name of a loss, e.g. ``"attention_kl"``; ``"hidden_proj_mse"`` for a ``hidden_mse`` with a
            projection.
        *tensors: the loss's tensors, or lists as the loss takes them; its mask may be among them, as other kernels
            are checked for calls that have one. Without any, float32 ones of BERT-base's sizes are assumed.
        impl: as given to the loss.
        device: where the assumed tensors live.

    Raises:
        ValueError: for an unknown loss, a device that is not there, or if that implementation cannot run.

    Example:
        >>> explain("attention_kl", impl="eager")
        'attention_kl on cpu: eager (asked for as eager)'
    """
    stem = op_of_loss(op)
    # Nothing reads them, so memory is all they cost, and hardly that: pages that nobody touches.
    try:
        given = float_tensors(tensors) or [
            torch.empty(shape, device=device) for shape in _TYPICAL[stem]
        ]
    # A PyTorch without CUDA asserts that it has it.
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"explain: device {str(device)!r} cannot be used here: {reason}") from None
    choice = resolve(stem, requested(impl), given, masked=has_mask(tensors))
    return f"{op} on {given[0].device.type}: {choice.impl} ({choice.reason})"
