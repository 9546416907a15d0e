"""Train in a child process that is killed again and again, and resumed until it is done.

    python training_victim.py FOLDER SEED

The parent imports what is needed and never computes, so that each child starts fresh without
paying for the imports. ``FOLDER/straight`` gets the uninterrupted run, ``FOLDER/killed`` the other,
``FOLDER/report.json`` how often and where the latter was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # like the next, imported here once and not in every child
import transformers.optimization  # noqa: F401
from training_fakes import FakeDistiller, collate, examples

from bertkd.training import Stage, checkpoint, loop, train

STAGE = Stage(
    objective="x",
    epochs=9,
    lr=0.02,
    batch_size=6,
    accumulate=2,
    warmup=3,
    log_every=5,
    save_every=3,
    eval_every=7,
    metric="accuracy",
    patience=6,
)


def noisy(rows):
    """A collate function that draws, as dynamic masking does."""
    batch = collate(rows)
    keep = torch.rand(batch["input_ids"].shape) > 0.1
    return batch | {"input_ids": batch["input_ids"].where(keep, 1)}


def evaluate(student):
    torch.rand(2)
    return {"accuracy": student.head.weight.abs().sum().item()}


def train_once(folder: Path, collate_fn) -> None:
    """One sitting; generators and initial weights are others in each, as after a reboot."""
    torch.set_num_threads(1)
    junk = int.from_bytes(os.urandom(4), "little")
    first_time = not checkpoint.checkpoints(folder)
    torch.manual_seed(junk)
    train(
        FakeDistiller(dropout=0.3, seed=0 if first_time else junk),
        STAGE,
        examples(27),
        output_dir=folder,
        collate=collate_fn,
        eval_fn=evaluate,
        resume=True,
        seed=4,
        log_with=None,
        progress=False,
    )


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(count: int, function):
    """``function``, but the ``count``-th call kills the process."""
    calls = iter(range(1, 10**9))

    def wrapped(*args, **kwargs):
        return die() if next(calls) == count else function(*args, **kwargs)

    return wrapped


# Moments that random kills seldom hit: between a checkpoint's files, before it gets its name, after
# it has, and during the evaluation that follows.
MOMENTS = {
    "files": lambda: setattr(checkpoint, "save_file", dying_at(4, checkpoint.save_file)),
    "name": lambda: setattr(os, "replace", dying_at(3, os.replace)),
    "prune": lambda: setattr(checkpoint, "prune", dying_at(2, checkpoint.prune)),
    "evaluation": lambda: setattr(loop, "run_eval", dying_at(1, loop.run_eval)),
}


def fatal(batches: int, seconds: float):
    """``noisy``, but the process dies ``seconds`` after its ``batches``-th batch, wherever it is.

    Counted in batches and not by the clock alone, so that a busy machine is killed as far on.
    """
    numbers = iter(range(1, 10**9))

    def collate_fn(rows):
        if next(numbers) == batches:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM: nothing here handles it
        return noisy(rows)

    return collate_fn


def sitting(folder: Path, moment: str = "", **after: float) -> bool:
    """Train in a child, killed at a moment or as ``fatal`` says; True if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            MOMENTS.get(moment, lambda: None)()
            train_once(folder, fatal(**after) if after else noisy)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL, -signal.SIGALRM):
        raise SystemExit(f"the training failed with status {status}")
    return status != 0


def main() -> None:
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    sitting(folder / "straight")
    kills = {}
    plans = [{"moment": moment} for moment in MOMENTS]
    plans += [
        {"batches": chance.randint(6, 18), "seconds": chance.uniform(1e-6, 0.02)} for _ in range(4)
    ]
    chance.shuffle(plans)
    for plan in plans:
        if sitting(folder / "killed", **plan):
            steps = checkpoint.checkpoints(folder / "killed")
            kills[str(plan)] = max(steps, default=0)
    sitting(folder / "killed")
    (folder / "report.json").write_text(json.dumps({"kills": kills}))


if __name__ == "__main__":
    main()
