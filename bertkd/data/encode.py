"""Texts to token ids, kept compactly."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bertkd.data.tables import Table
from bertkd.errors import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 2000


class EncodedRows(Sequence):
    """A sequence of encoded examples in flat arrays (4 bytes a token, not a Python list each).

    ``rows[i]`` is a dict of ``input_ids`` (list of int), ``token_type_ids`` (the same, if the
    tokenizer makes them), ``labels`` (int or float, if there are labels) and ``index`` (int: the
    row's number, which a slice keeps). ``rows[a:b]`` is again an ``EncodedRows``.

    Attributes:
        lengths: tokens of each row, int64, shape (rows,).
        truncated: how many rows were cut to the maximal length.
        longest: tokens of the longest row before cutting.
    """

    def __init__(
        self,
        input_ids: Sequence[np.ndarray],
        *,
        token_type_ids: Sequence[np.ndarray] | None = None,
        labels: np.ndarray | None = None,
        index: np.ndarray | None = None,
        truncated: int = 0,
        longest: int | None = None,
    ) -> None:
        self.lengths = np.array([len(ids) for ids in input_ids], np.int64)
        self._ends = np.cumsum(self.lengths)
        self._ids = np.concatenate([*input_ids, np.empty(0, np.int32)]).astype(np.int32)
        self._types = None
        if token_type_ids is not None:
            self._types = np.concatenate([*token_type_ids, np.empty(0, np.int8)]).astype(np.int8)
        self.labels = labels
        self._index = np.arange(len(self.lengths)) if index is None else index
        self.truncated = truncated
        self.longest = int(self.lengths.max(initial=0)) if longest is None else longest

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return self.take(range(*row.indices(len(self))))
        row = operator.index(row)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        span = self._span(row % len(self))
        example: dict[str, Any] = {"input_ids": self._ids[span].tolist()}
        if self._types is not None:
            example["token_type_ids"] = self._types[span].tolist()
        if self.labels is not None:
            example["labels"] = self.labels[row].item()
        example["index"] = int(self._index[row])
        return example

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: Sequence[int]) -> EncodedRows:
        """The given rows, which keep their ``index``."""
        rows = list(rows)
        spans = [self._span(row) for row in rows]
        types = None if self._types is None else [self._types[span] for span in spans]
        return EncodedRows(
            [self._ids[span] for span in spans],
            token_type_ids=types,
            labels=None if self.labels is None else self.labels[rows],
            index=self._index[rows],
        )

    def checksum(self) -> int:
        """CRC-32 of everything that a model gets to see of the rows."""
        parts = (self.lengths, self._ids, self._types, self.labels)
        checksum = 0
        for part in parts:
            if part is not None:
                checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
        return checksum

    def _span(self, row: int) -> slice:
        return slice(self._ends[row] - self.lengths[row], self._ends[row])


def check_max_length(tokenizer: PreTrainedTokenizerBase, max_length: int, *, pair: bool) -> None:
    """Refuse a ``max_length`` that leaves no room for text or is more than the tokenizer takes.

    Raises:
        TypeError: it is no whole number.
        ValueError: says which bound was missed.
    """
    max_length = whole_number("max_length", max_length)
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special + pair:
        raise ValueError(
            f"max_length={max_length} leaves no room for text: this tokenizer adds {special} "
            f"special tokens to a {'pair' if pair else 'text'}"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length={max_length} is more than this tokenizer's model_max_length="
            f"{tokenizer.model_max_length}: lower max_length, or set tokenizer.model_max_length if "
            "the model does have that many positions"
        )


def encode_rows(
    table: Table,
    text_column: str,
    pair_column: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: np.ndarray | None = None,
    allow_empty: bool = False,
) -> EncodedRows:
    """Tokenise one or two text columns; over-long rows are cut, the longer text of a pair first.

    Args:
        table: the texts.
        text_column: first (or only) text.
        pair_column: second text.
        tokenizer: any transformers tokenizer.
        max_length: tokens kept per row, special tokens included.
        labels: int64 or float32, shape (rows,).
        allow_empty: take ``""`` as a text (some GLUE questions are empty) instead of refusing it.

    Raises:
        ValueError: a missing column, a text that is missing, empty, no string or not Unicode (file
            and row are named), or an impossible ``max_length``.
    """
    check_max_length(tokenizer, max_length, pair=pair_column is not None)
    columns = [_texts(table, text_column, "text_column", allow_empty)]
    if pair_column is not None:
        columns.append(_texts(table, pair_column, "pair_column", allow_empty))
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    truncated = longest = 0
    for start in range(0, len(table), _CHUNK):
        chunk = [column[start : start + _CHUNK] for column in columns]
        batch = tokenizer(
            *chunk, truncation=True, max_length=max_length, return_attention_mask=False
        )
        full = [row for row, tokens in enumerate(batch["input_ids"]) if len(tokens) == max_length]
        if full:
            # Only a row of max_length tokens can have been cut: count those again, uncut.
            whole = tokenizer(*([column[row] for row in full] for column in chunk), verbose=False)
            sizes = [len(tokens) for tokens in whole["input_ids"]]
            truncated += sum(size > max_length for size in sizes)
            longest = max(longest, *sizes)
        longest = max(longest, *map(len, batch["input_ids"]))
        ids += [np.asarray(tokens, np.int32) for tokens in batch["input_ids"]]
        types += [np.asarray(tokens, np.int8) for tokens in batch.get("token_type_ids", ())]
    return EncodedRows(
        ids, token_type_ids=types or None, labels=labels, truncated=truncated, longest=longest
    )


def _texts(table: Table, name: str, argument: str, allow_empty: bool) -> list[str]:
    texts = []
    for row, text in enumerate(table.column(name, argument)):
        if text is None and allow_empty:
            text = ""
        if not isinstance(text, str) or (not text.strip() and not allow_empty):
            got = "an empty text" if isinstance(text, str) else f"{text!r}, not a text"
            raise ValueError(
                f"{table.where(row)}: column {name!r} holds {got}. Remove the row or fill it in."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can hold it as an escape; tokenizers fail on it without a word on where it stands.
            raise ValueError(
                f"{table.where(row)}: column {name!r} holds {text[error.start]!r}, half a character "
                f"(a lone surrogate), at position {error.start + 1}. Remove or replace it."
            ) from error
        texts.append(text)
    return texts
