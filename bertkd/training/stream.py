"""Batches in an order that depends on the seed and the update alone, whoever fetches them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bertkd.training.rng import kept_rng

Batch = Mapping[str, Tensor]
Collate = Callable[[list[Mapping[str, Any]]], Batch]
# (update, micro-batch, share of the update's examples, their number, rows)
_Key = tuple[int, int, float, int, list[int]]


class Plan:
    """Which rows make which micro-batch of which process at which update.

    An update's ``batch_size`` rows are dealt out to ``accumulate * processes`` parts. Each part's
    loss, a mean over its rows, is weighted by its share of them, so the gradient is that of the
    mean over all rows however unequal the parts are. (A loss that is a mean over *tokens* is
    weighted by rows all the same: equal to the undivided batch only where parts hold equally many.)

    Args:
        batches_of_epoch: the rows of each update of an epoch; as many in every epoch.
        steps_per_epoch: how many.
        accumulate: micro-batches per update and process.
        rank: this process.
        processes: how many there are.
    """

    def __init__(
        self,
        batches_of_epoch: Callable[[int], Sequence[Sequence[int]]],
        steps_per_epoch: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.batches_of_epoch = batches_of_epoch
        self.steps_per_epoch = steps_per_epoch
        self.accumulate = accumulate
        self.rank = rank
        self.processes = processes

    def keys(self, start: int, stop: int) -> Iterator[_Key]:
        """This process's micro-batches of updates ``start`` to ``stop``."""
        parts = self.accumulate * self.processes
        epoch = -1
        batches: Sequence[Sequence[int]] = []
        for update in range(start, stop):
            if update // self.steps_per_epoch != epoch:
                epoch = update // self.steps_per_epoch
                batches = self.batches_of_epoch(epoch)
            rows = list(batches[update % self.steps_per_epoch])
            for micro in range(self.accumulate):
                part = rows[micro * self.processes + self.rank :: parts]
                # DDP averages over processes, so weights add up to the number of them.
                share = len(part) * self.processes / len(rows)
                # Too few rows for all: a stand-in of weight 0, as every process must take part.
                yield update, micro, share, len(rows), part or rows[:1]


class _Batches(Dataset):
    """Item ``key`` is a collated micro-batch; what collating draws depends on the key alone."""

    def __init__(self, data: Any, collate: Collate, seed: int) -> None:
        self.data, self.collate, self.seed = data, collate, seed

    def __getitem__(self, key: _Key) -> tuple[Batch, float, int]:
        update, micro, share, size, rows = key
        with kept_rng(zlib.crc32(repr((self.seed, update, micro, rows[0])).encode())):
            return dict(self.collate([self.data[row] for row in rows])), share, size


def _as_is(item: Any) -> Any:
    return item


class _Keys:
    """The keys as a DataLoader's sampler."""

    def __init__(self, plan: Plan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[_Key]:
        return self.plan.keys(self.start, self.stop)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.plan.accumulate


def count_examples(data: Any, argument: str = "train_data") -> int:
    """Number of examples, of which the first is looked at.

    Args:
        data: a sequence of mappings with ``input_ids``.
        argument: what the caller's user knows it as.

    Raises:
        TypeError: a stream, which has no length, columns, or examples that are no mappings.
        ValueError: no examples, or one without ``input_ids``.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"{argument} must be a sequence of examples, got a {type(data).__name__}; load a stream "
            "of text with bertkd.data.load_blocks"
        )
    if isinstance(data, Mapping):
        raise TypeError(
            f"{argument} must be a sequence of examples, got a {type(data).__name__} of "
            f"{', '.join(map(str, data))}; pass one split, or a list with a dict per example"
        )
    if len(data) == 0:
        raise ValueError(f"{argument} is empty: it has no examples")
    _check_example(data[0], 0, argument)
    return len(data)


def example_lengths(data: Any, argument: str = "train_data") -> list[int]:
    """Tokens of each example, for batching by length; arguments and errors are those of ``count_examples``."""
    count = count_examples(data, argument)
    if hasattr(data, "lengths"):
        return list(data.lengths)
    # A datasets.Dataset gives a column at once, row by row it would be slow.
    if hasattr(data, "column_names"):
        return [len(ids) for ids in data["input_ids"]]
    examples = (data[row] for row in range(count))
    return [_check_example(example, row, argument) for row, example in enumerate(examples)]


def _check_example(example: Any, row: int, argument: str) -> int:
    if not isinstance(example, Mapping):
        raise TypeError(
            f"{argument}[{row}] must be a mapping with 'input_ids', got a {type(example).__name__}"
        )
    if "input_ids" not in example:
        raise ValueError(f"{argument}[{row}] has no 'input_ids', only {', '.join(example)}")
    return len(example["input_ids"])


def stream(
    data: Any,
    collate: Collate,
    plan: Plan,
    *,
    start: int,
    stop: int,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[Batch, float, int]]:
    """Micro-batches, their weights, and the examples of the whole update, from update ``start`` on.

    The global generators are left alone, so workers and prefetching do not change what is drawn
    elsewhere, and a run resumed in the middle sees the batches it would have seen.
    """
    if start >= stop:
        return iter(())
    return iter(
        DataLoader(
            _Batches(data, collate, seed),
            batch_size=None,
            sampler=_Keys(plan, start, stop),
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            # Without one of its own the loader would draw from the global generator.
            generator=torch.Generator(),
        )
    )
