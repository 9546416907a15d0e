"""Train in one of two processes with DDP over gloo on the CPU, or in one alone.

[RANK=... WORLD_SIZE=2 ...] python training_two_processes.py FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_fakes import FakeDistiller, collate, examples, same_state

from bertkd.errors import CheckpointError
from bertkd.training import Recipe, Stage, run_recipe, train

SETTINGS = {"collate": collate, "log_with": None, "progress": False}
FIRST = Stage(
    objective="x", name="one", steps=5, lr=0.02, batch_size=8, log_every=1, eval_every=None
)
# 19 examples: the last update of an epoch deals three examples out to two processes times two.
SECOND = Stage(
    objective="x",
    name="two",
    epochs=2,
    lr=0.02,
    batch_size=8,
    accumulate=2,
    log_every=2,
    save_every=4,
    eval_every=3,
    metric="accuracy",
)
RECIPE = Recipe(stages=(FIRST, SECOND), seed=3)


def evaluate(student: torch.nn.Module) -> dict[str, float]:
    return {"accuracy": student.head.weight.sum().item()}


def train_both(folder: Path, dropout: float = 0.0) -> tuple[FakeDistiller, list]:
    """Two stages on the same student; the teacher and the buffers are the module's."""
    module = FakeDistiller(dropout)
    results = run_recipe(
        RECIPE,
        lambda stage: module,
        examples(19),
        output_dir=folder,
        eval_fn=evaluate,
        **SETTINGS,
    )
    return module, results


def check_resumption(folder: Path) -> None:
    """With dropout, a resumed run ends where the uninterrupted one did, in both processes."""
    module, results = train_both(folder, dropout=0.5)
    stage = folder / "2-two"
    if torch.distributed.get_rank() == 0:
        (stage / f"checkpoint-{results[1].steps}" / "run.json").unlink()
    torch.distributed.barrier()
    again = FakeDistiller(0.5, seed=9)
    settings = SETTINGS | {"eval_fn": evaluate, "seed": RECIPE.seed, "resume": "last-good"}
    result = train(again, SECOND, examples(19), output_dir=stage, **settings)
    assert same_state(module, again)
    assert len(result.history) == len(results[1].history)


def check_disk(folder: Path) -> None:
    """A process that does not see the others' checkpoints must not start afresh beside them."""
    rank = torch.distributed.get_rank()
    place = folder / ("1-one" if rank == 0 else "on-a-disk-of-its-own")
    settings = SETTINGS | {"eval_fn": evaluate, "seed": RECIPE.seed, "resume": True}
    with pytest.raises(CheckpointError, match=r"checkpoints of different steps \(\[5, 0\]\)"):
        train(FakeDistiller(), FIRST, examples(19), output_dir=place, **settings)


def check_difference(folder: Path) -> None:
    """A process with fewer updates would leave the others waiting for it."""
    rank = torch.distributed.get_rank()
    stage = replace(FIRST, steps=5 - rank)
    with pytest.raises(
        ValueError, match=r"stage\.steps is 5 in process 0, 4 in process 1; data\.examples is 19 in"
    ):
        train(FakeDistiller(), stage, examples(19 - rank), output_dir=folder, **SETTINGS)


def check_dropout() -> None:
    """Processes that dropped the same units would learn the same thing twice."""
    draws = [None, None]
    torch.distributed.all_gather_object(draws, torch.rand(4).tolist())
    assert draws[0] != draws[1]


def main() -> None:
    folder = Path(sys.argv[1])
    if "RANK" not in os.environ:
        train_both(folder / "alone")
        return
    train_both(folder / "together")
    check_resumption(folder / "dropout")
    check_dropout()
    check_disk(folder / "together")
    check_difference(folder / "different")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
