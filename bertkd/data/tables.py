"""A table of named columns that can say which file and row a value came from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where their rows stand.

    Attributes:
        columns: values by column name; rows in file order.
        files: ``(name, rows)`` of the files that were joined, in order.
        rows: for each row its number in the joined files; ``None`` means 0, 1, 2, ...
    """

    columns: Mapping[str, Sequence[Any]]
    files: tuple[tuple[str, int], ...]
    rows: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def name(self) -> str:
        """The files' names, for messages."""
        return ", ".join(name for name, _ in self.files)

    def where(self, row: int) -> str:
        """``"train.csv, row 3"``: the place of ``row``, counting from 1 and without the header."""
        number = row if self.rows is None else self.rows[row]
        for name, count in self.files:
            if number < count:
                return f"{name}, row {number + 1}"
            number -= count
        raise IndexError(row)

    def column(self, name: str, argument: str) -> Sequence[Any]:
        """The values of column ``name``.

        Raises:
            ValueError: there is no such column; names ``argument``, the file and the nearest
                columns.
        """
        if name in self.columns:
            return self.columns[name]
        close = difflib.get_close_matches(name, self.columns, n=1, cutoff=0.5)
        close = close or [known for known in self.columns if known.lower() == name.lower()]
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(map(repr, self.columns)) or "none"
        raise ValueError(
            f"{argument}={name!r}: {self.name} has no such column.{hint} Its columns: {known}."
        )

    def take(self, rows: Sequence[int]) -> Table:
        """The given rows as a new table whose ``where`` still names their original places."""
        numbers = rows if self.rows is None else [self.rows[row] for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, self.files, list(numbers))


@dataclass(frozen=True)
class RawTask:
    """A task before tokenising: its tables by split, and what their columns mean.

    Attributes:
        name: of the task.
        tables: ``train``, and mostly ``validation``, ``test``, ``validation_<name>``.
        text_column: column of the first text.
        pair_column: column of the second text, if any.
        label_column: column of the label.
        regression: labels are numbers; ``None`` leaves it to the data.
        label_names: names of classes 0, 1, ...; ``None`` leaves it to the data.
        metrics: metric names, the deciding one first; ``None`` for the usual ones.
        allow_empty: an empty text is a text.
        cut_by_design: texts are excerpts anyway, so cutting them further deserves no warning.
    """

    name: str
    tables: dict[str, Table]
    text_column: str
    pair_column: str | None
    label_column: str
    regression: bool | None = None
    label_names: Sequence[str] | None = None
    metrics: tuple[str, ...] | None = None
    allow_empty: bool = False
    cut_by_design: bool = False


def join(tables: Sequence[Table]) -> Table:
    """Put tables with the same columns under one another.

    Raises:
        ValueError: the files do not have the same columns.
    """
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise ValueError(
                f"{first.name} and {table.name} are to be read as one, but their columns differ: "
                f"{sorted(first.columns)} and {sorted(table.columns)}"
            )
    columns = {name: [v for table in tables for v in table.columns[name]] for name in first.columns}
    return Table(columns, tuple(file for table in tables for file in table.files))
