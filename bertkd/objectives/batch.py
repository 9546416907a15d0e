"""What a batch must hold before two models are run on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertkd.objectives.base import Needs, Side
from bertkd.objectives.build import Objective
from bertkd.ops.checks import check_mask_dtype

# Columns that are read, or given to the models, as tensors.
_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "index")


def check_batch(batch: Mapping[str, Any], needs: Needs, objective: Objective) -> None:
    """Refuse a batch that the models or the terms could not use, by the column's name.

    Args:
        batch: as for `Distiller.forward`: (B, L) integer ids, and a mask of their shape, bool or integer.
        needs: what ``objective`` needs in this step.
        objective: of the two models; knows their positions and vocabularies.

    Raises:
        TypeError: it is no mapping, a column no tensor, the ids no integers, or the mask one of floats.
        ValueError: a column is missing or empty, the text is longer than a model's positions, or an id
            beyond its vocabulary (told on CPUs only, outside compiled graphs).
    """
    _check_columns(batch, needs, objective)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"batch['input_ids'] must be (B, L), neither of them 0, got shape {tuple(ids.shape)}"
        )
    if ids.is_floating_point():
        raise TypeError(f"batch['input_ids'] must be integers, got {ids.dtype}")
    if mask is not None:
        if mask.shape != ids.shape:
            raise ValueError(
                f"batch['attention_mask'] must have the shape of input_ids, {tuple(ids.shape)}, got "
                f"{tuple(mask.shape)}: the tokenizer's mask, 1 = real token"
            )
        check_mask_dtype("batch['attention_mask']", mask)
    # Asking a GPU would mean waiting for it, asking a graph breaking it.
    known = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    lowest, highest = map(int, ids.aminmax()) if known else (0, 0)
    for side in (objective.setup.student, objective.setup.teacher):
        _check_fits(side, ids.shape[1], lowest, highest)


def _check_columns(batch: Mapping[str, Any], needs: Needs, objective: Objective) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping such as what a tokenizer gives, got {type(batch).__name__}; "
            "call distiller({'input_ids': ..., 'attention_mask': ...})"
        )
    needed = {"input_ids": True, "labels": needs.labels, "index": needs.index}
    for column in needed:
        if needed[column] and batch.get(column) is None:
            raise ValueError(
                f"the batch has no {column!r}, which {objective.expression} needs; it has "
                f"{', '.join(map(repr, batch)) or 'nothing'}"
            )
    for column, value in batch.items():
        if column in _TENSORS and value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"batch[{column!r}] must be a tensor, got {type(value).__name__}; tokenize with "
                "return_tensors='pt'"
            )


def _check_fits(side: Side, length: int, lowest: int, highest: int) -> None:
    most = side.spec.max_positions
    if most is not None and length > most:
        raise ValueError(
            f"input_ids have {length} tokens, but the {side.role} has {most} positions; "
            f"tokenize with truncation=True, max_length={most}"
        )
    if lowest < 0 or highest >= side.spec.vocab_size:
        raise ValueError(
            f"input_ids run from {lowest} to {highest}, but the {side.role} embeds 0.."
            f"{side.spec.vocab_size - 1}; use the tokenizer of the models"
        )
