"""Tasks in local files: which file is which split, which column is what, and a split if there is none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from bertkd.data.files import FORMATS, find_split, read_table, read_tables
from bertkd.data.tables import RawTask, Table

_TEXT_COLUMNS = ("text", "sentence", "sentence1", "premise", "question", "question1")
_LABEL_COLUMNS = ("label", "labels", "score")
_STEMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def local_task(
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    validation_path: str | os.PathLike[str] | None = None,
    test_path: str | os.PathLike[str] | None = None,
    regression: bool | None = None,
    label_names: Sequence[str] | None = None,
) -> RawTask:
    """Read a file, or a directory of files named after their splits; see ``load_task``.

    Raises:
        FileNotFoundError: a file, or a directory's training file, is missing.
        ValueError: a file cannot be read, no usual column name is there and none was given, or one
            column is to be two things.
    """
    path = Path(path)
    tables = {}
    if path.is_dir():
        for split, stems in _STEMS.items():
            if files := find_split(path, stems):
                tables[split] = read_tables(files)
        if "train" not in tables:
            raise FileNotFoundError(
                f"no training file in {path}: looked for {' or '.join(_STEMS['train'])} with one "
                f"of {', '.join(FORMATS)}"
            )
    else:
        tables["train"] = read_table(path)
    for split, file in (("validation", validation_path), ("test", test_path)):
        if file is not None:
            tables[split] = read_table(file)
    train = tables["train"]
    text_column = text_column or _usual(train, _TEXT_COLUMNS, "text_column")
    label_column = label_column or _usual(train, _LABEL_COLUMNS, "label_column")
    used = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    for (one, column), (other, same) in combinations(used.items(), 2):
        if column == same:
            raise ValueError(
                f"{one} and {other} are both {column!r}: give each a column of its own"
            )
    return RawTask(
        name=path.stem,
        tables=tables,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column,
        regression=regression,
        label_names=label_names,
    )


def hold_out(
    table: Table, columns: Sequence[str], fraction: float, seed: int
) -> tuple[Table, Table]:
    """Divide a table into training and validation rows by a hash of their texts.

    The choice depends on nothing but the texts and the seed; rows with equal texts stay together,
    so no validation text is trained on.

    Args:
        table: all rows.
        columns: the text columns.
        fraction: share of the rows for validation, at least one row.
        seed: another seed, another choice.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {fraction}")
    arguments = zip(columns, ("text_column", "pair_column"), strict=False)
    texts = zip(*(table.column(name, argument) for name, argument in arguments), strict=True)
    keys = [
        hashlib.sha256(json.dumps([seed, *row], default=str).encode()).hexdigest() for row in texts
    ]
    last = sorted(keys)[max(1, round(fraction * len(keys))) - 1]
    held = [row for row, key in enumerate(keys) if key <= last]
    kept = [row for row, key in enumerate(keys) if key > last]
    if not kept:
        raise ValueError(
            f"{table.name} has {len(table)} rows, too few different ones to hold out "
            f"validation_fraction={fraction} of them: give a validation file"
        )
    return table.take(kept), table.take(held)


def _usual(table: Table, names: Sequence[str], argument: str) -> str:
    for name in names:
        if name in table.columns:
            return name
    raise ValueError(
        f"{table.name} has none of the usual columns {', '.join(names)}: pass {argument}= with one "
        f"of its columns {', '.join(map(repr, table.columns))}"
    )
