"""Short runs of `bertkd distill` on a tiny task, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

from tiny_task import save_reviews, save_tiny_model

from bertkd.cli.main import main

FAST = ["--log_with", "none", "--max_length", "16", "--batch_size", "16"]
FAST += ["--eval_every", "1000", "--save_every", "1000"]


def save_place(root: Path) -> dict[str, str]:
    """A task and a teacher with a head for it, which need not know anything."""
    names = {0: "bad", 1: "good"}
    teacher = save_tiny_model(root / "teacher", head_cls="sequence", num_labels=2, id2label=names)
    return {"task": save_reviews(root / "reviews"), "teacher": teacher}


def distill(place: dict[str, str], folder: Path, *words: str) -> int:
    """Exit code of a run into ``folder``, with a student of two of the teacher's blocks unless one is named."""
    fixed = ["--teacher", place["teacher"], "--output_dir", str(folder)]
    layers = [] if "--student" in words else ["--layers", "uniform:2"]
    return main(["distill", *fixed, *layers, *FAST, *words])
