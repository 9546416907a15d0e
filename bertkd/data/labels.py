"""What a label column holds: classes or numbers, and which number stands for which class."""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertkd.data.tables import Table
from bertkd.errors import whole_number


@dataclass(frozen=True)
class LabelSpace:
    """The labels of a task.

    Attributes:
        regression: labels are float32 numbers, not classes.
        names: class ``i`` is called ``names[i]``; empty for regression.
        by_index: integer labels are class numbers as they stand (``names`` was given by the
            caller).
    """

    regression: bool
    names: tuple[str, ...] = ()
    by_index: bool = False

    @property
    def num_labels(self) -> int:
        """Width of the model's output: the number of classes, or 1."""
        return 1 if self.regression else len(self.names)

    def encode(self, table: Table, column: str, known_from: str = "the label names") -> np.ndarray:
        """Labels of ``table`` as int64 class numbers or float32 values, shape (rows,).

        Raises:
            ValueError: a label is missing, not finite, not a number or not among ``names``; names
                the file and row.
        """
        values = _present(table, column)
        if self.regression:
            return np.array(
                [_number(v, table, column, i) for i, v in enumerate(values)], np.float32
            )
        index = {name: i for i, name in enumerate(self.names)}
        if self.by_index:
            index = {str(i): i for i in range(len(self.names))} | index
        encoded = np.empty(len(values), np.int64)
        for row, value in enumerate(values):
            name = _class_name(value)
            if name not in index:
                close = difflib.get_close_matches(name, index, n=1, cutoff=0.6)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"{table.where(row)}: unknown label {name!r} in column {column!r}.{hint} "
                    f"Known from {known_from}: {_listed(self.names)}."
                )
            encoded[row] = index[name]
        return encoded


def infer_labels(
    table: Table,
    column: str,
    *,
    regression: bool | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
) -> LabelSpace:
    """Decide what the labels in ``column`` of the training table are.

    A column of fractional or floating-point numbers is a regression target unless ``regression`` is
    False; everything else are classes. Integer classes keep their order; other classes are
    sorted by name.

    Args:
        table: the training data.
        column: its label column.
        regression: overrides the guess.
        num_labels: what the caller expects; 1 means regression, as in transformers' configs.
        label_names: names of classes 0, 1, ...; labels may then be names or class numbers.

    Raises:
        TypeError: ``num_labels`` is no whole number, or ``label_names`` a single text.
        ValueError: the arguments contradict each other or the data; missing or non-finite labels,
            or several in one row.
    """
    if isinstance(label_names, str):
        raise TypeError(f"label_names must be a list of names, got the text {label_names!r}")
    if label_names is not None:
        label_names = [str(name) for name in label_names]
        if len(set(label_names)) < len(label_names):
            raise ValueError(f"label_names names a class twice: {label_names}")
        if num_labels is not None and num_labels != len(label_names):
            raise ValueError(
                f"num_labels={num_labels}, but there are {len(label_names)} classes: "
                f"{_listed(label_names)}"
            )
    if num_labels is not None:
        whole_number("num_labels", num_labels, least=1)
    if regression is None and num_labels == 1:
        regression = True
    if regression and (label_names is not None or (num_labels or 1) != 1):
        raise ValueError(
            f"regression=True has one output and no classes, but num_labels={num_labels} and "
            f"label_names={label_names} were given: leave them out, or pass regression=False"
        )
    values = _present(table, column)
    if label_names is None and regression is not False:
        floats = all(map(_is_number, values)) and not all(map(_is_integer, values))
        if floats and regression is None and all(float(v).is_integer() for v in values):
            warnings.warn(
                f"{table.name}: column {column!r} holds floats, so this is taken as regression; "
                "they are whole numbers: pass regression=False if they are classes",
                stacklevel=4,
            )
        if regression or floats:
            if num_labels not in (None, 1):
                raise ValueError(
                    f"num_labels={num_labels}, but column {column!r} of {table.name} holds floats, "
                    "which is regression with one output: pass regression=False if they are classes"
                )
            return LabelSpace(regression=True)
    if label_names is not None:
        return LabelSpace(False, tuple(label_names), by_index=True)
    return LabelSpace(False, _class_names(values, table, column, num_labels))


def _class_names(
    values: Sequence[Any], table: Table, column: str, num_labels: int | None
) -> tuple[str, ...]:
    for row, value in enumerate(values):
        if _is_number(value) and not float(value).is_integer():
            raise ValueError(
                f"{table.where(row)}: {value!r} in column {column!r} is a fraction, not a class: "
                "leave regression=False out, or fix the column"
            )
    found = {_class_name(value) for value in values}
    names = sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found)
    place = f"column {column!r} of {table.name}"
    if num_labels is None:
        if len(names) < 2:
            raise ValueError(f"{place} holds one class only ({names[0]!r}): nothing to learn from")
        return tuple(names)
    if len(names) > num_labels:
        raise ValueError(
            f"num_labels={num_labels}, but {place} holds {len(names)} classes: {_listed(names)}. "
            f"Pass num_labels={len(names)}, or regression=True if they are numbers to predict."
        )
    numbered = [str(i) for i in range(num_labels)]
    if set(names) <= set(numbered):
        return tuple(numbered)
    if len(names) < num_labels:
        raise ValueError(
            f"num_labels={num_labels}, but {place} holds {len(names)} classes: {_listed(names)}. "
            f"Pass num_labels={len(names)}, or label_names= with all {num_labels} names."
        )
    return tuple(names)


def _present(table: Table, column: str) -> Sequence[Any]:
    values = table.column(column, "label_column")
    for row, value in enumerate(values):
        text = value.strip().lower() if isinstance(value, str) else value
        if text is None or text in ("", "nan") or (isinstance(text, float) and math.isnan(text)):
            raise ValueError(
                f"{table.where(row)}: no label in column {column!r} (got {value!r}): "
                "remove the row or fill the label in"
            )
        if isinstance(value, list | tuple | dict):
            raise ValueError(
                f"{table.where(row)}: column {column!r} holds {value!r}, not one label: tasks with "
                "several labels per row are not supported"
            )
    return values


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("-").isdecimal()
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _class_name(value: Any) -> str:
    # with regression=False classes may come as 0.0, 1.0 from a column that once had gaps
    if _is_number(value) and not _is_integer(value) and float(value).is_integer():
        return str(int(float(value)))
    return str(value).strip()


def _number(value: Any, table: Table, column: str, row: int) -> float:
    number = float(value) if _is_number(value) else math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{table.where(row)}: the label in column {column!r} must be a finite number for "
            f"regression, got {value!r}"
        )
    return number


def _listed(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
