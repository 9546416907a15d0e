"""A tiny model on disk and a task that it can learn, for tests of whole commands."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

WORDS = {"good": ["good", "great", "happy", "likes"], "bad": ["bad", "sad", "error", "none"]}
FILLERS = ["the", "a", "film", "movie", "plot", "story", "of", "is", "was", "it", "and"]


def save_tiny_model(path: Path, *, layers: int = 4, head_cls: str | None = None, **config) -> str:
    """Save a random BERT of ``layers`` blocks with its tokenizer; returns the folder's name."""
    # Small weights, as those of real models, so that it learns within seconds.
    config = {"initializer_range": 0.02, **config}
    tiny_model("bert", layers=layers, head_cls=head_cls, **config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def review_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Reviews that hold one telling word each, with label ``good`` or ``bad``."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        label = "good" if number % 2 else "bad"
        words = generator.choices(FILLERS, k=generator.randint(3, 8))
        words.insert(generator.randrange(len(words)), generator.choice(WORDS[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def save_reviews(folder: Path) -> str:
    """Write ``train.csv``, ``validation.csv`` and ``test.csv``; returns the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": 64, "validation": 24, "test": 24}.items()):
        save_csv(folder / f"{split}.csv", review_rows(count, seed))
    return str(folder)


def save_csv(path: Path, rows: list[dict[str, str]]) -> str:
    """Write a CSV file with a header, also without any rows; returns its name."""
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ("text", "label"))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
