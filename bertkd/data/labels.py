"""What a label column holds: classes or numbers, and which number stands for which class."""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertkd.data.tables import Table
from bertkd.errors import whole_number

# How pandas, R and SQL write a missing value; "" and "nan" are never anything else.
_GAPS = ("NA", "N/A", "n/a", "<NA>", "#N/A", "NULL", "null", "None")


@dataclass(frozen=True)
class LabelSpace:
    """The labels of a task.

    Attributes:
        regression: labels are float32 numbers, not classes.
        names: class ``i`` is called ``names[i]``; empty for regression.
        by_index: a table may hold class numbers instead of names (``names`` was given by the
            caller), unless classes are named by numbers themselves.
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
            ValueError: a label is missing, not finite, not a number or not among ``names``, or names
                and class numbers are mixed; names the file and row.
        """
        values = _present(table, column, self.names)
        if self.regression:
            return np.array(
                [_number(v, table, column, i) for i, v in enumerate(values)], np.float32
            )
        found = [_class_name(value) for value in values]
        index, other = self._readings(next(iter(found), None))
        for row, name in enumerate(found):
            if name in index:
                continue
            known = f"Known from {known_from}: {_listed(self.names)}."
            if name in other:
                raise ValueError(
                    f"{table.where(row)}: column {column!r} mixes class numbers and names, "
                    f"{found[0]!r} and {name!r}: write all labels in one way. {known}"
                )
            close = difflib.get_close_matches(name, index, n=1, cutoff=0.6)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            if self.by_index and not other and _is_integer(name):
                hint = (
                    f" The column holds {_listed(sorted(set(found)))}; where classes are named by "
                    "numbers, labels are taken for names, not for class numbers: write the names."
                )
            raise ValueError(
                f"{table.where(row)}: unknown label {name!r} in column {column!r}.{hint} {known}"
            )
        return np.array([index[name] for name in found], np.int64)

    def _readings(self, first: str | None) -> tuple[dict[str, int], dict[str, int]]:
        """How to read labels that start with ``first``, and the other way, if there is one."""
        named = {_class_name(name): i for i, name in enumerate(self.names)}
        # "1" beside classes "1" and "2" is the first by its name and the second by its number.
        if not self.by_index or any(map(_is_number, self.names)):
            return named, {}
        numbered = {str(i): i for i in range(len(self.names))}
        return (numbered, named) if first in numbered else (named, numbered)


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
    False or classes are expected; everything else are classes. Integer classes keep their order;
    other classes are sorted by name.

    Args:
        table: the training data.
        column: its label column.
        regression: overrides the guess.
        num_labels: what the caller expects; 1 means regression, as in transformers' configs.
        label_names: names of classes 0, 1, ...; labels may then all be names or all class numbers.

    Raises:
        TypeError: ``num_labels`` is no whole number, or ``label_names`` a single text.
        ValueError: the arguments contradict each other or the data; missing or non-finite labels,
            several in one row, or classes among numbers to predict.
    """
    if isinstance(label_names, str):
        raise TypeError(f"label_names must be a list of names, got the text {label_names!r}")
    if label_names is not None:
        label_names = [str(name) for name in label_names]
        if len(set(map(_class_name, label_names))) < len(label_names):
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
    values = _present(table, column, label_names or ())
    if label_names is not None:
        return LabelSpace(False, tuple(label_names), by_index=True)
    floats = all(map(_is_number, values)) and not all(map(_is_integer, values))
    if regression or (floats and regression is None and num_labels is None):
        if not regression and all(float(v).is_integer() for v in values):
            warnings.warn(
                f"{table.name}: column {column!r} holds floats, so they are taken for numbers to "
                "predict (regression), but all are whole. If they are classes, write them without "
                f"a point in the file ({_class_name(values[0])}, not {values[0]}), or pass "
                "regression=False to load_task",
                stacklevel=4,
            )
        return LabelSpace(regression=True)
    return LabelSpace(False, _class_names(values, table, column, num_labels))


def _class_names(
    values: Sequence[Any], table: Table, column: str, num_labels: int | None
) -> tuple[str, ...]:
    place = f"column {column!r} of {table.name}"
    _check_one_kind(values, table, column)
    found = Counter(map(_class_name, values))
    names = sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found)
    if gaps := [name for name in names if name in _GAPS]:
        warnings.warn(
            f"{place}: {_listed(gaps)}, in {sum(found[name] for name in gaps)} of {len(values)} "
            "rows, is taken for a class; if it stands for a missing label, remove these rows",
            stacklevel=5,
        )
    if num_labels is None:
        if len(names) < 2:
            raise ValueError(f"{place} holds one class only ({names[0]!r}): nothing to learn from")
        if 2 * len(names) > len(values) >= 20:
            warnings.warn(
                f"{place} holds {len(names)} classes in {len(values)} rows, such as {_listed(names, 3)}: is it "
                "the label (label_column)? Numbers to predict are written with a point",
                stacklevel=5,
            )
        return tuple(names)
    expected = f"{num_labels} classes are expected (num_labels, or the model's)"
    if len(names) > num_labels:
        raise ValueError(
            f"{expected}, but {place} holds {len(names)}: {_listed(names)}. Take a model or "
            f"num_labels with {len(names)} classes"
            + (", or one output to predict numbers." if all(map(_is_integer, names)) else ".")
        )
    numbered = [str(i) for i in range(num_labels)]
    if set(names) <= set(numbered):
        return tuple(numbered)
    if len(names) < num_labels:
        raise ValueError(
            f"{expected}, but {place} holds {len(names)}: {_listed(names)}. Which of them these "
            f"are is unknown: write class numbers, 0 to {num_labels - 1}, instead, or give all "
            f"{num_labels} names (label_names, or id2label in the model's config.json)."
        )
    return tuple(names)


def _check_one_kind(values: Sequence[Any], table: Table, column: str) -> None:
    """Refuse classes that are really numbers to predict, or one class written in two ways."""
    words = [value for value in values if not _is_number(value)]
    for row, value in enumerate(values):
        if _is_number(value) and not float(value).is_integer():
            raise ValueError(
                f"{table.where(row)}: {value!r} in column {column!r} is a fraction, not a class"
                + (
                    f", and {words[0]!r} in the same column is no number: labels are either all "
                    "classes or all numbers to predict, fix the column"
                    if words
                    else ": numbers to predict need a single output (num_labels=1 or "
                    "regression=True, or a model that has one), else fix the column"
                )
            )
    switches = [value for value in words if isinstance(value, bool)]
    for row, value in enumerate(values if switches else ()):
        if _is_number(value):
            raise ValueError(
                f"{table.where(row)}: {value!r} in column {column!r} stands beside "
                f"{str(switches[0]).lower()}: write all labels in one way"
            )


def _present(table: Table, column: str, known: Sequence[str] = ()) -> Sequence[Any]:
    values = table.column(column, "label_column")
    # Beside names these words may be classes: "None" is one where stances or relations are told.
    alone = all(_is_gap(value) or _is_number(value) for value in values)
    gaps = [word for word in _GAPS if word not in known] if alone else []
    for row, value in enumerate(values):
        text = value.strip() if isinstance(value, str) else value
        missing = text is None or (isinstance(text, float) and math.isnan(text))
        if missing or (isinstance(text, str) and (text.lower() in ("", "nan") or text in gaps)):
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


def _is_gap(value: Any) -> bool:
    return isinstance(value, str) and value.strip() in _GAPS


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
    # With regression=False classes may come as 0.0, 1.0 from a column that once had gaps.
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
