"""What a batch must hold before two models are run on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bertkd.encoders import unwrap
from bertkd.objectives.base import Needs, Side
from bertkd.objectives.build import Objective
from bertkd.objectives.sides import model_inputs
from bertkd.ops.checks import check_mask_dtype

# Columns of numbers that models may look up in a table of their own, and the table's size in their config.
_TABLES = {"token_type_ids": "type_vocab_size", "position_ids": "max_position_embeddings"}
_INDICES = (torch.int64, torch.int32)


def check_batch(
    batch: Mapping[str, Any],
    needs: Needs,
    objective: Objective,
    student: nn.Module,
    teacher: nn.Module,
) -> None:
    """Refuse a batch that the models or the terms could not use, by the column's name.

    A column that no model takes and no term reads may hold anything.

    Args:
        batch: as for `Distiller.forward`: (B, L) integer ids, and a mask of their shape, bool or integer.
        needs: what ``objective`` needs in this step.
        objective: of the two models; knows their positions and vocabularies.
        student, teacher: the models; say whether they take types and positions, and which.

    Raises:
        TypeError: it is no mapping, a column no tensor, ids, types or positions neither int64 nor int32,
            or the mask one of floats.
        ValueError: a column is missing, empty or of another shape, the text is longer than a model's
            positions, or a number beyond what a model embeds (told on CPUs only, outside compiled graphs).
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping such as what a tokenizer gives, got {type(batch).__name__}; "
            "call distiller({'input_ids': ..., 'attention_mask': ...})"
        )
    _check_columns(batch, needs, objective)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"batch['input_ids'] must be (B, L), neither of them 0, got shape {tuple(ids.shape)}"
        )
    _check_dtype("input_ids", ids)
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
    models = ((objective.setup.student, student), (objective.setup.teacher, teacher))
    for column in _TABLES:
        if batch.get(column) is not None:
            _check_looked_up(column, batch[column], ids, models)


def _check_columns(batch: Mapping[str, Any], needs: Needs, objective: Objective) -> None:
    needed = {"input_ids": True, "labels": needs.labels, "index": needs.index}
    for column in needed:
        if needed[column] and batch.get(column) is None:
            raise ValueError(
                f"the batch has no {column!r}, which {objective.expression} needs; it has "
                f"{', '.join(map(repr, batch)) or 'nothing'}"
            )
    # kd reads labels where there are some.
    read = needed | {"attention_mask": True, "labels": needs.labels or needs.teacher_logits}
    for column in read:
        if read[column] and batch.get(column) is not None:
            _check_tensor(column, batch[column])


def _check_tensor(column: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"batch[{column!r}] must be a tensor, got {type(value).__name__}; tokenize with "
            "return_tensors='pt'"
        )


def _check_dtype(column: str, value: Tensor) -> None:
    if value.dtype not in _INDICES:
        raise TypeError(
            f"batch[{column!r}] must be int64 or int32, got {value.dtype}; pass what the tokenizer "
            "gives, or convert it with .long()"
        )


def _check_looked_up(
    column: str, value: Any, ids: Tensor, models: Sequence[tuple[Side, nn.Module]]
) -> None:
    """Types or positions: of a shape that broadcasts to the ids', and below the size of each model's table.

    Whether a model takes them is asked only of a column that is wrong: asking costs more than the checks.
    """
    try:
        _check_tensor(column, value)
        _check_dtype(column, value)
        sizes = zip(reversed(value.shape), reversed(ids.shape), strict=False)
        if value.dim() > 2 or any(size not in (1, wanted) for size, wanted in sizes):
            raise ValueError(
                f"batch[{column!r}] must have the shape of input_ids, {tuple(ids.shape)}, or one that broadcasts "
                f"to it, got {tuple(value.shape)}"
            )
    except (TypeError, ValueError):
        if any(_takes(model, column, ids) for _, model in models):
            raise
        return
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest, highest = map(int, value.aminmax())
    for side, model in models:
        size = _table_size(column, side, model)
        if size is None or 0 <= lowest <= highest < size:
            continue
        if _takes(model, column, ids):
            raise ValueError(
                f"{column} run from {lowest} to {highest}, but the {side.role} embeds 0..{size - 1}; use "
                "what its tokenizer gives, or leave the column out"
            )


def _takes(model: nn.Module, column: str, ids: Tensor) -> bool:
    return column in model_inputs(model, {column: ids})


def _table_size(column: str, side: Side, model: Any) -> int | None:
    """Rows of the table a model looks the column up in; None where it has none."""
    rotary = column == "position_ids" and side.spec.max_positions is None
    return None if rotary else getattr(unwrap(model).config, _TABLES[column], None)


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
