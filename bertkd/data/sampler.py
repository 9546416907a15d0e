"""Batches of similar length in an order that depends on seed and epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from bertkd.errors import whole_number


class LengthBucketSampler(Sampler[list[int]]):
    """A batch sampler: lists of row numbers of similar length, resumable and shardable.

    Rows are shuffled, divided into pools of ``bucket_batches`` batches, sorted by length inside a
    pool and cut into batches, which are then shuffled. All of it depends on ``(seed, epoch)``
    alone.

    With ``world_size`` processes, the joint batch has ``batch_size * world_size`` rows and each
    rank takes every ``world_size``-th of them: batch k of all ranks together is batch k of one
    process with the joint batch size. All ranks get equally many batches; if the last joint batch
    cannot be divided evenly some ranks' share is one row smaller, and if it has fewer rows than
    there are ranks it is left out.

    Iterating goes through one epoch and moves on to the next; ``state_dict`` says where it stands.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch and process.
        seed: of the order.
        shuffle: False keeps the rows in order of their number, without any sorting.
        drop_last: leave out the last joint batch if it is not full.
        bucket_batches: joint batches per pool; more means less padding and less mixing.
        rank: this process.
        world_size: how many there are.

    Raises:
        TypeError: a size, the rank or the seed is no whole number.
        ValueError: no rows, a non-positive size, a negative seed, a rank out of range, or not a single batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        bucket_batches: int = 50,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        if self.lengths.ndim != 1 or not len(self.lengths):
            raise ValueError(
                f"lengths must hold one number per row and at least one, got {lengths!r}"
            )
        sizes = {
            "batch_size": batch_size,
            "bucket_batches": bucket_batches,
            "world_size": world_size,
        }
        for argument, value in sizes.items():
            whole_number(argument, value, least=1)
        whole_number("seed", seed, least=0)
        if not 0 <= whole_number("rank", rank) < world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}"
            )
        # int(), because NumPy's integers are not JSON-able.
        self.batch_size, self.seed, self.shuffle = int(batch_size), int(seed), shuffle
        self.drop_last, self.bucket_batches = drop_last, int(bucket_batches)
        self.rank, self.world_size = int(rank), int(world_size)
        self.joint_size = self.batch_size * self.world_size
        self.epoch = self.position = 0

        full, rest = divmod(len(self.lengths), self.joint_size)
        self._count = full + (not drop_last and rest >= world_size)
        if not self._count:
            raise ValueError(
                f"{len(self.lengths)} rows make no batch of {batch_size} on {world_size} "
                "process(es): lower batch_size or leave drop_last out"
            )

    def __len__(self) -> int:
        """Batches per epoch and process, wherever the sampler stands."""
        return self._count

    def batches(self, epoch: int) -> list[list[int]]:
        """This process's batches of one epoch, independent of where the sampler stands."""
        joint = self._joint_batches(epoch)
        return [batch[self.rank :: self.world_size].tolist() for batch in joint]

    def __iter__(self) -> Iterator[list[int]]:
        if self.position >= self._count:
            self.epoch, self.position = self.epoch + 1, 0
        for batch in self.batches(self.epoch)[self.position :]:
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; inside that epoch already, stay (as a resumed run must)."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the sampler stands, as JSON-able values.

        Args:
            consumed: batches of this epoch that were trained on, for loops whose data loader
                fetches ahead; default: those handed out.
        """
        position = self.position if consumed is None else consumed
        epoch = self.epoch
        if position >= self._count:
            epoch, position = epoch + 1, 0
        return {"epoch": epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with exactly the batch that would have come next.

        The number of processes may differ as long as the joint batch is the same.

        Raises:
            ValueError: the state is of other data or other settings; names them.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"this sampler's state is of another run: {name} was {state.get(name)!r}, now "
                    f"it is {value!r}. Use the same data and settings, or start anew."
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "joint_size": self.joint_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "bucket_batches": self.bucket_batches,
            "lengths_sha256": hashlib.sha256(self.lengths.astype("<i8").tobytes()).hexdigest(),
        }

    def _joint_batches(self, epoch: int) -> list[np.ndarray]:
        rows = np.arange(len(self.lengths))
        if not self.shuffle:
            return self._cut(rows)[: self._count]
        generator = np.random.default_rng([self.seed, epoch])
        # Which rows a dropped last batch leaves out is decided before sorting, or it would be the longest ones.
        rows = generator.permutation(rows)[: self._count * self.joint_size]
        pool = self.joint_size * self.bucket_batches
        pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
        # Stable, so that rows of equal length stay in shuffled order; the pool only decides which rows share a batch.
        ordered = [part[np.argsort(self.lengths[part], kind="stable")] for part in pools]
        batches = self._cut(np.concatenate(ordered))
        return [batches[i] for i in generator.permutation(len(batches))]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[i : i + self.joint_size] for i in range(0, len(rows), self.joint_size)]
