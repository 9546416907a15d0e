"""Local files as tables: CSV, TSV, JSON Lines and Parquet, without pandas."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bertkd.data.tables import Table, join

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_LONGEST_FIELD = 1 << 27


def read_table(
    path: str | os.PathLike[str],
    *,
    header: Sequence[str] | None = None,
    skip_ragged: bool = False,
) -> Table:
    """Read one file; its suffix says the format.

    CSV follows RFC 4180 (quotes may hold commas and line breaks). TSV has no quoting, as GLUE's
    files. CSV and TSV values are strings. Text is UTF-8, with or without a byte order mark.

    Args:
        path: a file ending in one of ``FORMATS``.
        header: column names of a CSV or TSV file that has none.
        skip_ragged: leave out CSV and TSV rows with missing or surplus fields, with a warning,
            instead of refusing them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown format, no rows, another separator, a row with missing or surplus fields, broken JSON, or
            bytes that are not UTF-8; names the file and the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: unknown format {suffix!r}; known: {', '.join(FORMATS)}")
    if suffix == ".parquet":
        columns = _read_parquet(path)
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                if suffix in (".csv", ".tsv"):
                    columns = _read_delimited(file, path, header, skip_ragged)
                else:
                    columns = _read_json_lines(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    rows = len(next(iter(columns.values()), ()))
    if not rows:
        raise ValueError(f"{path} is empty: it has no rows")
    return Table(columns, ((str(path), rows),))


def find_split(folder: Path, stems: Iterable[str]) -> list[Path]:
    """Files of the one of ``stems`` that ``folder`` has: ``train.csv``, or shards ``train-00000-of-00002``.

    Where a stem stands in several formats, the last of ``FORMATS`` (Parquet, which has types) wins.

    Raises:
        ValueError: shards are missing, a whole file stands beside shards, or files of several stems beside
            each other.
    """
    found = [files for stem in stems if (files := _files_of(folder, stem))]
    if len(found) > 1:
        raise ValueError(
            f"{folder} has both {found[0][0].name} and {found[1][0].name}, which stand for the same split: "
            "take one of them out"
        )
    return found[0] if found else []


def _files_of(folder: Path, stem: str) -> list[Path]:
    for suffix in reversed(FORMATS):
        whole = folder / f"{stem}{suffix}"
        shards = sorted(p for p in folder.glob(f"{stem}-*-of-*{suffix}") if p.is_file())
        if shards and whole.is_file():
            raise ValueError(
                f"{folder} has both {whole.name} and {shards[0].name}: take one of them out"
            )
        _check_shards(shards)
        if shards or whole.is_file():
            return shards or [whole]
    return []


def _check_shards(shards: Sequence[Path]) -> None:
    counts = {path.stem.rsplit("-of-", 1)[1] for path in shards}
    if len(counts) > 1 or any(c.isdecimal() and int(c) != len(shards) for c in counts):
        raise ValueError(
            f"{shards[0].parent} has {len(shards)} shards that say 'of {', '.join(sorted(counts))}' "
            f"({', '.join(path.name for path in shards[:4])}): some are missing, or there are too many"
        )


def read_tables(paths: Sequence[Path], **options: Any) -> Table:
    """Read several files with the same columns as one table; ``options`` as for ``read_table``."""
    return join([read_table(path, **options) for path in paths])


def _read_delimited(
    file: Iterable[str], path: Path, header: Sequence[str] | None, skip_ragged: bool
) -> dict[str, list[Any]]:
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.reader(
        file,
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    # The module's own limit of 128 KiB a field is a guard against files that are no CSV.
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    names = list(header) if header else (rows.pop(0) if rows else [])
    if len(names) == 1 and any(separator in names[0] for separator in ",;|\t"):
        raise ValueError(
            f"{path}: the header is one column, {names[0]!r}. A file ending in .csv is separated by commas and "
            "one in .tsv by tabs: write it so, or rename it"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: the header names a column twice: {names}")
    if skip_ragged:
        whole = [row for row in rows if len(row) == len(names)]
        if len(whole) < len(rows):
            warnings.warn(
                f"{path}: {len(rows) - len(whole)} of {len(rows)} rows have missing or surplus "
                "fields and are left out",
                stacklevel=2,
            )
        rows = whole
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(
                f"{path}, row {number}: {len(row)} fields, but the header has {len(names)} "
                f"({', '.join(names)}). Is the separator right, and are texts that hold it quoted?"
            )
    columns = zip(*rows, strict=True) if rows else [[] for _ in names]
    return {name: list(values) for name, values in zip(names, columns, strict=True)}


def _read_json_lines(file: Iterable[str], path: Path) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: not an object with named columns: {line!r:.80}"
            )
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: reading Parquet needs pyarrow, which comes with: pip install datasets"
        ) from error
    try:
        return parquet.read_table(path).to_pydict()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
