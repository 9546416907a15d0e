"""Width of a student: which sizes can be sliced out of a teacher, and the slice of each weight."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from bertkd.encoders import EncoderSpec
from bertkd.errors import whole_number

# Not ALBERT and MobileBERT: shared blocks and bottlenecks are not made of leading rows and columns.
SLICEABLE: tuple[str, ...] = (
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "ernie",
    "modernbert",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
)

# Weights whose rows (columns) are heads x head width, and those that stack several matrices.
_HEAD_ROWS = re.compile(r"\b(query|key|value|[qkv]_lin|[qkv]_proj|Wqkv)\.(weight|bias)$")
_HEAD_COLUMNS = re.compile(r"\b(attention\.output\.dense|out_lin|o_proj|attn\.Wo)\.weight$")
_STACKED = {"Wqkv": 3, "Wi": 2}


def narrow_config(
    config: Any,
    spec: EncoderSpec,
    *,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
) -> None:
    """Write the narrower sizes of a student to ``config``, its teacher's ``spec`` being given.

    Sizes that are not given stay the teacher's; the head width is ``hidden_size / num_heads``.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if the architecture cannot be sliced, a size is larger than the teacher's, or
            the head width is not whole, wider than the teacher's, or, with rotary positions, odd
            or no divisor of the teacher's.
    """
    if spec.model_type not in SLICEABLE:
        raise ValueError(
            f"a narrower {spec.model_type!r} cannot be sliced out of its teacher: leave out "
            f"hidden_size, num_heads and intermediate_size (possible for {', '.join(SLICEABLE)})"
        )
    inner_field = "hidden_dim" if spec.model_type == "distilbert" else "intermediate_size"
    hidden_size = _size("hidden_size", hidden_size, spec.hidden_size)
    num_heads = _size("num_heads", num_heads, spec.num_heads)
    inner = _size("intermediate_size", intermediate_size, getattr(config, inner_field))
    if inner is not None:
        setattr(config, inner_field, inner)
    if hidden_size is None and num_heads is None:
        return
    hidden, heads = hidden_size or spec.hidden_size, num_heads or spec.num_heads
    head_dim = _head_width(spec, hidden, heads)
    # An ELECTRA whose embeddings are as wide as its blocks has no projection between them.
    if getattr(config, "embedding_size", None) == spec.hidden_size:
        config.embedding_size = hidden
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = head_dim
    config.hidden_size, config.num_attention_heads = hidden, heads


class Slicer:
    """Cuts a teacher's weights to the student's shapes; equal shapes pass as they are.

    Every axis keeps its first coordinates. Axes made of heads keep the first heads and of each
    head the first coordinates; with rotary positions, evenly spaced rotation pairs instead, whose
    frequencies are those of the narrower head. Stacked matrices are cut one by one.

    Args:
        teacher: sizes of the teacher.
        student: sizes of the student, none larger.
    """

    def __init__(self, teacher: EncoderSpec, student: EncoderSpec) -> None:
        width = student.head_dim
        within = torch.arange(width)
        if _is_rotary(teacher):
            # Coordinates i and i + width / 2 turn together, by base ** (-2i / width).
            pairs = torch.arange(width // 2) * (teacher.head_dim // width)
            within = torch.cat([pairs, pairs + teacher.head_dim // 2])
        self._heads = (torch.arange(student.num_heads)[:, None] * teacher.head_dim + within).ravel()

    def __call__(self, name: str, weight: Tensor, shape: torch.Size) -> Tensor:
        """The slice of ``weight`` of the given ``shape``; ``name`` tells where the heads are."""
        for axis, size in enumerate(shape):
            if weight.shape[axis] == size:
                continue
            stacked = _STACKED.get(name.split(".")[-2], 1) if axis == 0 else 1
            if (_HEAD_ROWS if axis == 0 else _HEAD_COLUMNS).search(name):
                part = self._heads
            else:
                part = torch.arange(size // stacked)
            offsets = torch.arange(stacked)[:, None] * (weight.shape[axis] // stacked)
            weight = weight.index_select(axis, (offsets + part).ravel().to(weight.device))
        return weight


def _size(name: str, value: int | None, limit: int) -> int | None:
    if value is None:
        return None
    size = whole_number(name, value)
    if not 1 <= size <= limit:
        raise ValueError(f"{name} must be from 1 to the teacher's {limit}, got {size}")
    return size


def _is_rotary(spec: EncoderSpec) -> bool:
    return spec.max_positions is None


def _head_width(spec: EncoderSpec, hidden: int, heads: int) -> int:
    width, rest = divmod(hidden, heads)
    sizes = f"hidden_size={hidden} with num_heads={heads}"
    if rest:
        raise ValueError(f"{sizes}: hidden_size must be divisible by num_heads")
    if width > spec.head_dim:
        raise ValueError(
            f"{sizes} makes heads of width {width}, wider than the teacher's {spec.head_dim}: "
            f"use num_heads={-(-hidden // spec.head_dim)} or a smaller hidden_size"
        )
    if _is_rotary(spec) and (width % 2 or spec.head_dim % width):
        raise ValueError(
            f"{sizes} makes heads of width {width}; with rotary positions that must be even and "
            f"divide the teacher's {spec.head_dim}: num_heads={hidden // spec.head_dim} keeps "
            "whole heads"
        )
    return width
