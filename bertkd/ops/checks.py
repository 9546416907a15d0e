"""Argument checks of the public losses: every message names the argument, what it got and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from bertkd.errors import whole_number

REDUCTIONS = ("mean", "sum", "none")
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)

# What a query projection gives is (B, L, H * D).
_RANK_HINTS = {
    4: " Pass (B, H, L, D); x.unflatten(-1, (heads, -1)).transpose(1, 2) splits (B, L, H * D) into heads."
}


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """Refuse what is no tensor, and a DTensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}.")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{op}: {name} is a DTensor. Call the loss inside the wrapped module's forward, where FSDP has "
            f"gathered it, or pass {name}.full_tensor()."
        )


def check_tensors(op: str, rank: int | None, **tensors: Tensor) -> None:
    """Refuse what is not a floating-point tensor of ``rank`` dimensions (None: one or more), DTensors, a width of 0,
    and a mix of devices."""
    device: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be floating point, got {tensor.dtype}. Cast it with .float()."
            )
        if rank is not None and tensor.dim() != rank:
            raise ValueError(
                f"{op}: {name} must have {rank} dimensions, got shape {tuple(tensor.shape)}.{_RANK_HINTS.get(rank, '')}"
            )
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{op}: the last dimension of {name} must be at least 1, got shape {tuple(tensor.shape)}."
            )
        if device is None:
            device = (name, tensor.device)
        elif device[1] != tensor.device:
            raise ValueError(
                f"{op}: {device[0]} is on {device[1]} but {name} on {tensor.device}. Move them to one device."
            )


def check_mask(op: str, mask: Tensor, rows: tuple[int, ...], device: torch.device) -> None:
    """Refuse what is no tensor of the rows' shape and device, and a mask of floats."""
    check_tensor(op, "mask", mask)
    if tuple(mask.shape) != rows:
        raise ValueError(
            f"{op}: mask must have shape {rows}, got {tuple(mask.shape)}. Pass the tokenizer's 2-D attention_mask "
            "(1 = real token), not an additive one."
        )
    check_mask_dtype(f"{op}: mask", mask)
    check_device(op, "mask", mask, device)


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor that is not on the others' device."""
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, the tensors on {device}. Move it there."
        )


def check_mask_dtype(name: str, mask: Tensor) -> None:
    """Refuse a mask of floats: an additive one is 0 at real tokens and would be taken for its opposite."""
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{name} must be bool or integer, 1 = real token, got {mask.dtype}. If it holds ones and zeros, pass "
            "mask.bool(); if it is an additive one, mask == 0."
        )


def check_bias(op: str, name: str, bias: Tensor | None, width: int, device: torch.device) -> None:
    """Refuse a bias that is not floating point, of shape (width,) and on the device."""
    if bias is None:
        return
    check_tensors(op, None, **{name: bias})
    if tuple(bias.shape) != (width,):
        raise ValueError(f"{op}: {name} must have shape {(width,)}, got {tuple(bias.shape)}.")
    check_device(op, name, bias, device)


def check_options(op: str, reduction: str, temperature: float = 1.0) -> None:
    """Refuse an unknown reduction or a temperature that is not positive."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}."
        )
    check_number(op, "temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}.")


def check_number(op: str, name: str, value: float) -> None:
    """Refuse what is no finite number; a tensor too, which would get no gradient and make the host wait."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a number, got a tensor; pass float({name}). It is not trained: to train a scale, "
            "multiply a tensor by it."
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    if not abs(value) < float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got {value}.")


def check_clamps(op: str, min_prob: float | None = None, min_score: float | None = None) -> None:
    """Refuse a clamp of the released code that is not a finite number, and a ``min_prob`` outside (0, 1)."""
    for name, value in (("min_prob", min_prob), ("min_score", min_score)):
        if value is not None:
            check_number(op, name, value)
    if min_prob is not None and not 0 < min_prob < 1:
        raise ValueError(f"{op}: min_prob must lie between 0 and 1, got {min_prob}.")


def check_window(op: str, window: int) -> int:
    """Refuse what is no number of tokens to either side."""
    return whole_number(f"{op}: window (tokens to either side)", window, least=0)


def check_attention(op: str, names: Sequence[str], block: Sequence[Tensor]) -> None:
    """Refuse (a, b) pairs that disagree in shape, or student and teacher that cannot be compared.

    Args:
        op: name of the loss, for the message.
        names: of the arguments, in the order of ``block``.
        block: a and b of the student, a and b of the teacher, (B, H, L, D) each.
    """
    a_s, b_s, a_t, b_t = block
    for (first, second), a, b in ((names[:2], a_s, b_s), (names[2:], a_t, b_t)):
        if a.shape != b.shape:
            raise ValueError(
                f"{op}: {first} and {second} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}."
            )
    if a_s.shape[0] != a_t.shape[0] or a_s.shape[2] != a_t.shape[2]:
        raise ValueError(
            f"{op}: student (B, L) = ({a_s.shape[0]}, {a_s.shape[2]}) and teacher ({a_t.shape[0]}, {a_t.shape[2]}) "
            "must agree: feed both networks the same batch from the same tokenizer."
        )
    if a_s.shape[1] != a_t.shape[1]:
        raise ValueError(
            f"{op}: the student has {a_s.shape[1]} heads and the teacher {a_t.shape[1]}. Pass relation_heads=R, with R "
            "dividing both hidden widths, to compare R re-split relation heads (as MiniLMv2 does)."
        )


def regroup_heads(op: str, name: str, x: Tensor, relation_heads: int | None) -> Tensor:
    """Concatenate the heads of (B, H, L, D) and re-split them into ``relation_heads``: (B, R, L, H D / R)."""
    if relation_heads is None:
        return x
    relation_heads = whole_number(f"{op}: relation_heads", relation_heads)
    batch, heads, length, width = x.shape
    if relation_heads < 1 or (heads * width) % relation_heads:
        raise ValueError(
            f"{op}: relation_heads={relation_heads} does not divide the hidden width {heads * width} of {name}."
        )
    # A view where q comes out of a model as (B, L, H, D) transposed.
    joined = x.transpose(1, 2).reshape(
        batch, length, relation_heads, heads * width // relation_heads
    )
    return joined.transpose(1, 2)
