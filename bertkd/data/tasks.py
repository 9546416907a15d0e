"""Task data: labelled texts from GLUE, local files or Python's docstrings, encoded for a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertkd.data.encode import EncodedRows, encode_rows
from bertkd.data.files import FORMATS
from bertkd.data.glue import GLUE_TASKS, glue_name, glue_task
from bertkd.data.labels import LabelSpace, infer_labels
from bertkd.data.local import hold_out, local_task
from bertkd.data.pydocs import PYDOCS_TASKS, pydocs_task
from bertkd.data.tables import RawTask
from bertkd.errors import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskData:
    """A task, ready for training and evaluation.

    Each split is a sequence of dicts with ``input_ids``, ``token_type_ids`` (if the tokenizer makes
    them), ``labels`` (int class, or float) and ``index`` (the row's number in its split); it has
    ``lengths`` (int64 array). Attention masks are the collator's work.

    Attributes:
        name: the task's name, or the file's.
        train: training rows.
        validation: rows for choosing the best checkpoint.
        test: rows for the final figure; ``None`` if there are none.
        num_labels: width of the model's output (1 for regression).
        label_names: name of class i; empty for regression.
        regression: labels are float32 numbers.
        metric_names: names in ``bertkd.training.metrics.METRICS``.
        primary_metric: the one that chooses the best checkpoint (larger is better).
        extra_validation: more validation sets by name (MNLI's ``"mismatched"``).
        notes: what was decided on the way (a split made, texts cut), one sentence each.
    """

    name: str
    train: EncodedRows
    validation: EncodedRows
    test: EncodedRows | None
    num_labels: int
    label_names: tuple[str, ...]
    regression: bool
    metric_names: tuple[str, ...]
    primary_metric: str
    extra_validation: Mapping[str, EncodedRows] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_built_in(name: str) -> bool:
    """Whether ``load_task`` takes ``name`` for a task of its own, not for a file."""
    return glue_name(name) is not None or name in PYDOCS_TASKS


def load_task(
    name_or_path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    validation_path: str | os.PathLike[str] | None = None,
    test_path: str | os.PathLike[str] | None = None,
    glue_dir: str | os.PathLike[str] | None = None,
    regression: bool | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    sources: Sequence[str] = ("stdlib",),
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> TaskData:
    """Load and encode a task.

    Args:
        name_or_path: a GLUE task (``"rte"``, ``"SST-2"``), ``"pydocs-topic"``, ``"pydocs-match"``,
            a CSV, TSV, JSON Lines or Parquet file, or a directory of such files named ``train``,
            ``validation`` (or ``dev``, ``valid``, ``val``) and ``test``.
        tokenizer: the model's tokenizer.
        max_length: tokens per example, special tokens included; longer ones are cut with a warning.
        text_column: column of the (first) text in local files; default ``text``, ``sentence``,
            ``sentence1``, ``premise``, ``question`` or ``question1``, whichever is there.
        pair_column: column of the second text; default none.
        label_column: column of the label; default ``label``, ``labels`` or ``score``.
        validation_path: local validation file.
        test_path: local test file.
        glue_dir: directory with GLUE's files; default: the hub.
        regression: the label is a number to predict; default: it is if the column holds floats and
            no classes are expected.
        num_labels: expected number of classes; 1 means regression.
        label_names: names of classes 0, 1, ..., of which a file holds either the names or, unless
            they are numbers themselves, the class numbers; default: integer labels in order, others
            sorted.
        validation_fraction: share of the training rows that is held out where a local task has no
            validation data; chosen by a hash of the texts, so equal texts stay together.
        sources: whose docstrings the ``pydocs`` tasks use, see ``read_docstrings``.
        cache_dir: where parsed docstrings are kept.
        seed: of the split by ``validation_fraction``; nothing else here is random.

    Raises:
        TypeError: ``max_length`` or ``num_labels`` is no whole number.
        ValueError: unknown task, missing column, empty file, empty text, unknown or missing label,
            contradictory arguments; the message names file, row and what to do.
        FileNotFoundError: a file is missing.
        ModuleNotFoundError: an optional library is missing.
    """
    name = os.fspath(name_or_path)
    local: dict[str, Any] = {
        "text_column": text_column,
        "pair_column": pair_column,
        "label_column": label_column,
        "validation_path": validation_path,
        "test_path": test_path,
        "regression": regression,
        "label_names": label_names,
    }
    glue = glue_name(name)
    if is_built_in(name):
        given = [argument for argument, value in local.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: only for local files, and {name!r} is a built-in task (a "
                f"file or directory of that name is ./{name})"
            )
        raw = glue_task(glue, glue_dir) if glue else pydocs_task(name, sources, cache_dir)
    elif Path(name).exists():
        raw = local_task(name, **local)
    elif Path(name).suffix.lower() in FORMATS or Path(name).name != name:
        raise FileNotFoundError(f"no such file or directory: {name}")
    elif name == "pydocs-retrieval":
        raise ValueError("pydocs-retrieval has no labels to train on: bertkd.data.load_retrieval")
    else:
        raise unknown_name("task", name, [*GLUE_TASKS, *PYDOCS_TASKS])
    if glue_dir is not None and not glue:
        raise ValueError(f"glue_dir is for GLUE's tasks only, and {name!r} is none of them")
    return encode_task(
        raw,
        tokenizer=tokenizer,
        max_length=max_length,
        num_labels=num_labels,
        validation_fraction=validation_fraction,
        seed=seed,
    )


def encode_task(
    raw: RawTask,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
    num_labels: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> TaskData:
    """Encode tables as ``load_task`` does; for data that comes from elsewhere.

    Raises:
        ValueError: as ``load_task``.
    """
    train = raw.tables["train"]
    space = infer_labels(
        train,
        raw.label_column,
        regression=raw.regression,
        num_labels=num_labels,
        label_names=raw.label_names,
    )
    texts = [raw.text_column] + ([raw.pair_column] if raw.pair_column else [])
    tables, notes = raw.tables, []
    if "validation" not in tables:
        kept, held = hold_out(train, texts, validation_fraction, seed)
        tables = {**tables, "train": kept, "validation": held}
        notes.append(
            f"{train.name} comes without validation data: {len(held)} of its {len(train)} rows are "
            f"held out for it (validation_fraction={validation_fraction}, seed={seed})"
        )
    for split, table in tables.items():
        if split != "train" and raw.label_column not in table.columns:
            raise ValueError(
                f"{table.name} has no column {raw.label_column!r}: the {split} split is scored and "
                "needs labels. Add them, or take the file out."
            )
    known_from = "label_names or the model" if raw.label_names is not None else train.name
    splits = {
        split: encode_rows(
            table,
            *texts,
            tokenizer=tokenizer,
            max_length=max_length,
            labels=space.encode(table, raw.label_column, known_from),
            allow_empty=raw.allow_empty,
        )
        for split, table in tables.items()
    }
    cut = _truncation_note(splits, max_length, tokenizer.model_max_length)
    for note in notes if raw.cut_by_design else notes + cut:
        warnings.warn(note, stacklevel=3)
    metrics = raw.metrics or _usual_metrics(space)
    prefix = "validation_"
    return TaskData(
        name=raw.name,
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        num_labels=space.num_labels,
        label_names=space.names,
        regression=space.regression,
        metric_names=metrics,
        primary_metric=metrics[0],
        extra_validation={
            split.removeprefix(prefix): rows
            for split, rows in splits.items()
            if split.startswith(prefix)
        },
        notes=tuple(notes + cut),
    )


def _truncation_note(
    splits: Mapping[str, EncodedRows], max_length: int, model_max_length: int
) -> list[str]:
    counts = {split: rows.truncated for split, rows in splits.items() if rows.truncated}
    if not counts:
        return []
    longest = max(rows.longest for rows in splits.values())
    room = f" (this tokenizer takes up to {model_max_length})"
    return [
        f"{sum(counts.values())} of {sum(map(len, splits.values()))} examples are longer than "
        f"max_length={max_length} tokens and were cut ("
        + ", ".join(f"{split}: {count}" for split, count in counts.items())
        + f"; the longest has {longest}): raise max_length{room if model_max_length < 1e9 else ''} "
        "or shorten the texts"
    ]


def _usual_metrics(space: LabelSpace) -> tuple[str, ...]:
    if space.regression:
        return ("pearson", "spearman")
    return ("accuracy", "f1") if space.num_labels == 2 else ("accuracy", "macro_f1")
