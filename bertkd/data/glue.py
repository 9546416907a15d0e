"""The nine GLUE tasks, from the hub or from a local directory (https://gluebenchmark.com)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bertkd.data.files import FORMATS, find_split, read_tables
from bertkd.data.hub import load_hub_tables
from bertkd.data.tables import RawTask, Table

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """What sets a GLUE task apart.

    Attributes:
        folder: its folder in GLUE's own download.
        texts: names of the text columns on the hub.
        labels: class names in the hub's order; empty for regression.
        metrics: GLUE's metrics; the first one chooses the best checkpoint.
        aliases: other names of columns, in GLUE's own files.
        header: column names where GLUE's own files have none.
    """

    folder: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    aliases: tuple[tuple[str, str], ...] = ()
    header: tuple[str, ...] | None = None


_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "not_entailment")
GLUE_TASKS = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("mcc", "accuracy"),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(
        "MRPC",
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
        (("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label")),
    ),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        (("is_duplicate", "label"),),
    ),
    "stsb": GlueTask("STS-B", _PAIR, (), ("pearson", "spearman"), (("score", "label"),)),
    "mnli": GlueTask(
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        aliases=(
            ("sentence1", "premise"),
            ("sentence2", "hypothesis"),
            ("gold_label", "label"),
        ),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), _NLI),
    "rte": GlueTask("RTE", _PAIR, _NLI),
    "wnli": GlueTask("WNLI", _PAIR, tuple(reversed(_NLI))),
}


def glue_name(name: str) -> str | None:
    """``"SST-2"`` and ``"sst2"`` -> ``"sst2"``; ``None`` if it is no GLUE task."""
    plain = name.lower().replace("-", "").replace("_", "")
    return plain if plain in GLUE_TASKS else None


def glue_task(name: str, glue_dir: str | os.PathLike[str] | None = None) -> RawTask:
    """Read a GLUE task, with the hub's column names and class order wherever it comes from.

    MNLI's ``validation`` is the matched set, and ``validation_mismatched`` comes with it. GLUE's
    test labels are hidden, so there is no test table.

    Args:
        name: a key of ``GLUE_TASKS``.
        glue_dir: a directory with one folder per task: GLUE's own TSV files (``SST-2/train.tsv``,
            ``SST-2/dev.tsv``) or the hub's files (``sst2/train-00000-of-00001.parquet``); any
            format of ``bertkd.data.files.FORMATS``. ``None`` asks the hub.

    Raises:
        FileNotFoundError: a folder or file is missing; says which were looked for.
        ModuleNotFoundError: the hub is asked and ``datasets`` is not installed.
    """
    task = GLUE_TASKS[name]
    tables = (
        load_hub_tables(HUB_NAME, name, hint=f"pass glue_dir= to read {name} from local files")
        if glue_dir is None
        else _read_folder(task, name, Path(glue_dir))
    )
    tables = {split: _rename(table, dict(task.aliases)) for split, table in tables.items()}
    if name == "mnli":
        tables["validation"] = tables.pop("validation_matched")
    wanted = ("train", "validation", "validation_mismatched")
    return RawTask(
        name=name,
        tables={split: tables[split] for split in wanted if split in tables},
        text_column=task.texts[0],
        pair_column=task.texts[1] if len(task.texts) > 1 else None,
        label_column="label",
        regression=not task.labels,
        label_names=task.labels or None,
        metrics=task.metrics,
        allow_empty=True,  # QQP has a few empty questions, and scores compare over all rows
    )


def _read_folder(task: GlueTask, name: str, glue_dir: Path) -> dict[str, Table]:
    folders = [glue_dir / task.folder, glue_dir / name, glue_dir / name.upper()]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no folder for GLUE's {name} in glue_dir={glue_dir}: looked for "
            f"{', '.join(dict.fromkeys(folder.name for folder in folders))}"
        )
    suffixes = ("_matched", "_mismatched") if name == "mnli" else ("",)
    stems = {"train": ["train"]} | {
        f"validation{suffix}": [f"validation{suffix}", f"dev{suffix}"] for suffix in suffixes
    }
    tables = {}
    for split, names in stems.items():
        paths = find_split(folder, names)
        if not paths:
            raise FileNotFoundError(
                f"no {split} file in {folder}: looked for {' or '.join(names)} with one of "
                f"{', '.join(FORMATS)}"
            )
        # A few rows of GLUE's own QQP lack fields.
        header = _missing_header(task, paths[0])
        tables[split] = read_tables(paths, header=header, skip_ragged=name == "qqp")
    return tables


def _missing_header(task: GlueTask, path: Path) -> tuple[str, ...] | None:
    if task.header is None or path.suffix != ".tsv":
        return None
    with path.open(encoding="utf-8-sig") as file:
        names = file.readline().rstrip("\n").split("\t")
    return None if task.texts[0] in names else task.header


def _rename(table: Table, aliases: dict[str, str]) -> Table:
    taken = set(table.columns) - set(aliases)
    columns = {
        (aliases[name] if name in aliases and aliases[name] not in taken else name): values
        for name, values in table.columns.items()
    }
    return Table(columns, table.files, table.rows)
