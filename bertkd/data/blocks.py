"""Pretraining text as a resumable stream of blocks of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from bertkd.data.corpus import Corpus
from bertkd.data.encode import EncodedRows, check_max_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000


class TextBlocks(IterableDataset):
    """A stream of blocks of exactly ``max_length`` tokens, cut from the texts of a corpus.

    Texts are shuffled in chunks of a thousand, tokenised and joined with the separator token; a
    block may begin and end inside a text. Each block is a dict of ``input_ids`` (list of int, with
    the special tokens of a single text) and ``index`` (its running number). The order depends on
    the corpus, the seed and the epoch alone; the position can be saved and restored.

    With several processes each takes every ``world_size``-th block.

    Args:
        corpus: ``open_corpus(...)``, or a list of texts.
        tokenizer: the model's tokenizer.
        max_length: tokens per block, special tokens included.
        epochs: passes through the corpus; ``None`` goes on for ever.
        seed: of the order.
        rank: this process.
        world_size: how many there are.

    Raises:
        ValueError: an empty corpus, one with too little text for a single block, an impossible
            ``max_length`` or rank.
    """

    def __init__(
        self,
        corpus: Corpus | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        *,
        epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_max_length(tokenizer, max_length, pair=False)
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}"
            )
        self.corpus = corpus if isinstance(corpus, Corpus) else Corpus.of_texts(corpus)
        self.tokenizer, self.max_length, self.epochs = tokenizer, max_length, epochs
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._start: dict[str, Any] = {"epoch": 0, "chunk": 0, "left_over": [], "first_block": 0}
        self._next_block = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        workers = get_worker_info()
        if workers is not None and workers.num_workers > 1:
            raise ValueError("TextBlocks is one stream: use a DataLoader with num_workers=0 or 1")
        before, after = self._frame()
        body = self.max_length - len(before) - len(after)
        while self.epochs is None or self._start["epoch"] < self.epochs:
            epoch, skipped = self._start["epoch"], self._start["chunk"]
            texts = itertools.islice(self.corpus.texts(), skipped * _CHUNK, None)
            for number, chunk in enumerate(_chunks(texts), start=skipped):
                self._start.update(chunk=number)
                tokens = [*self._start["left_over"], *self._tokens(chunk, epoch, number)]
                count, first = len(tokens) // body, self._start["first_block"]
                for block in range(max(self._next_block - first, 0), count):
                    self._next_block = first + block + 1
                    if (first + block) % self.world_size == self.rank:
                        ids = tokens[block * body : (block + 1) * body]
                        yield {"input_ids": [*before, *ids, *after], "index": first + block}
                self._start.update(
                    chunk=number + 1, left_over=tokens[count * body :], first_block=first + count
                )
            if not self._start["first_block"] and self._start["chunk"] == 0:
                raise ValueError(f"{self.corpus.name} is empty: it has no text")
            if not self._start["first_block"]:
                raise ValueError(
                    f"{self.corpus.name} has {len(self._start['left_over'])} tokens, less than one "
                    f"block of {body}: lower max_length or add text"
                )
            self._start.update(epoch=epoch + 1, chunk=0)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last block handed out, as JSON-able values."""
        return {**self._start, "next_block": self._next_block, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the next block; only the chunk that holds it is tokenised again.

        Raises:
            ValueError: the state is of another corpus or other settings; names them.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"this stream's state is of another run: {name} was {state.get(name)!r}, now "
                    f"it is {value!r}"
                )
        self._start = {name: state[name] for name in self._start}
        self._next_block = state["next_block"]

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.name,
            "seed": self.seed,
            "max_length": self.max_length,
            "world_size": self.world_size,
        }

    def _frame(self) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        first, last = special.index(0), len(ids) - special[::-1].index(0)
        return ids[:first], ids[last:]

    def _tokens(self, texts: list[str], epoch: int, chunk: int) -> Iterator[int]:
        order = np.random.default_rng([self.seed, epoch, chunk]).permutation(len(texts))
        encoded = self.tokenizer(
            [texts[i] for i in order],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        separator = self.tokenizer.sep_token_id
        for ids in encoded:
            yield from ids
            if separator is not None:
                yield separator


def load_blocks(
    corpus: Corpus | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
    *,
    seed: int = 0,
    limit: int | None = None,
) -> EncodedRows:
    """One pass of ``TextBlocks`` in memory (4 bytes a token), for corpora that fit.

    Args:
        corpus: as for ``TextBlocks``.
        tokenizer: the model's tokenizer.
        max_length: tokens per block.
        seed: of the order.
        limit: stop after so many blocks.

    Raises:
        ValueError: as ``TextBlocks``.
    """
    blocks = TextBlocks(corpus, tokenizer, max_length, epochs=1, seed=seed)
    return EncodedRows(
        [np.asarray(block["input_ids"], np.int32) for block in itertools.islice(blocks, limit)]
    )


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(itertools.islice(texts, _CHUNK)):
        yield chunk
