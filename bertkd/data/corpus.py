"""Unlabelled text to read again and again: files, hub data sets, docstrings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bertkd.data.doc_splits import split_by_module
from bertkd.data.docstring_cache import read_docstrings
from bertkd.data.files import FORMATS
from bertkd.data.hub import load_from_hub


@dataclass(frozen=True)
class Corpus:
    """Texts in a fixed order.

    Attributes:
        name: for messages, and to recognise the corpus when a run is resumed.
        read: gives a fresh iterator over the texts.
    """

    name: str
    read: Callable[[], Iterable[str]]

    def texts(self) -> Iterator[str]:
        """The texts from the start, without blank ones.

        Raises:
            ValueError: when it comes to something that is no text; names its number.
        """
        for number, text in enumerate(self.read(), start=1):
            if not isinstance(text, str):
                raise ValueError(f"{self.name}: text {number} is {text!r}, not a text")
            if text.strip():
                yield text

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Corpus:
        """A corpus in memory."""
        if isinstance(texts, str):
            raise TypeError(
                "a corpus is a sequence of texts, not one text: open_corpus reads files"
            )
        return cls(f"a list of {len(texts)} texts", lambda: texts)


def open_corpus(
    source: str | os.PathLike[str],
    *,
    text_column: str = "text",
    sources: Sequence[str] = ("stdlib",),
    cache_dir: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Open a corpus; nothing is held in memory but docstrings.

    Args:
        source: a UTF-8 text file with one text per line, a directory of such ``.txt`` files (read
            in the order of their paths), ``"hub:<name>"`` or ``"hub:<owner>/<name>:<config>"`` for
            the training split of a hub data set (streamed), or ``"pydocs"`` for the docstrings of
            the training side of ``split_by_module``.
        text_column: the text's column in a hub data set.
        sources: whose docstrings, see ``read_docstrings``.
        cache_dir: see ``read_docstrings``.

    Raises:
        FileNotFoundError: no such file, or a directory without ``.txt`` files.
        ModuleNotFoundError: a hub data set is asked for and ``datasets`` is not installed.
        OSError: the hub data set cannot be loaded.
        ValueError: no hub data set is named, it has no such column, or the file is a table of columns; when
            read, a file that is not UTF-8.
    """
    name = os.fspath(source)
    if name == "pydocs":
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        train = split_by_module(read_docstrings(sources, cache_dir=cache_dir))["train"]
        texts = [" ".join(record.text.split()) for record in train]
        return Corpus(f"pydocs of {', '.join(sources)}", lambda: texts)
    if name.startswith("hub:"):
        path, _, config = name.removeprefix("hub:").partition(":")
        if not path:
            raise ValueError(f"corpus {name}: name a data set of the hub, 'hub:<owner>/<name>'")
        data = load_from_hub(path, config or None, split="train", streaming=True)
        columns = data.column_names
        if columns is not None and text_column not in columns:
            raise ValueError(
                f"text_column={text_column!r}: {name} has no such column. Its columns: "
                f"{', '.join(map(repr, columns))}."
            )
        return Corpus(name, lambda: (row[text_column] for row in data))
    place = Path(name)
    found = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    files = [path for path in found if path.is_file()]
    if place.is_file() and place.suffix.lower() in FORMATS:
        raise ValueError(
            f"corpus {name}: a text file is read line by line, and this is a table. Write its texts "
            "to a .txt file, one per line."
        )
    if not files:
        wanted = "it has no .txt files" if place.is_dir() else "no such file or directory"
        raise FileNotFoundError(f"corpus {name}: {wanted}")
    return Corpus(name, lambda: _lines(files))


def _lines(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        try:
            with file.open(encoding="utf-8-sig") as lines:
                yield from (line.strip() for line in lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
