"""``bertkd evaluate``: a model's scores on a task."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertkd.cli.options import TaskOptions

if TYPE_CHECKING:
    from bertkd.study.workload import Workload

ALL = "all"


@dataclass(kw_only=True)
class Config(TaskOptions):
    """Score a model on a task, beside its teacher if one is given.

      bertkd evaluate --model runs/rte/model --task rte --max_length 512
      bertkd evaluate --model runs/rte/model --task new.csv --split all
      bertkd evaluate --model student --teacher teacher --task pydocs-retrieval --split test

    Attributes:
        model: Folder of the model, or its name on the Hugging Face Hub.
        teacher: Second model to compare with; for pydocs-retrieval also by Spearman's rho of all
            similarities.
        split: validation, test, another validation set of the task, or all: every row of a local file.
        max_length: Tokens per example at most; give the length that the model was trained with (512 in
            the recipes of GLUE's tasks).
        output: JSON file to write the scores to.
    """

    model: str
    teacher: str | None = None
    split: str = "validation"
    max_length: int = 128
    output: str | None = None

    def scored_split(self) -> str:
        """The split that holds what is to be scored: a whole file is loaded as one of its own."""
        return "validation" if self.split == ALL else self.split


def prepare(config: Config) -> Callable[[], None]:
    """Load data and models; the result runs them.

    Raises:
        ValueError, FileNotFoundError: whatever cannot work, by the name of its option.
    """
    from bertkd.study.models import head_of, load_config, load_model, load_tokenizer, saved_labels
    from bertkd.study.workload import check_labels, is_local

    if config.task is None:
        raise ValueError("no data: give --task (a task's name or a file).")
    local = is_local(config.task)
    if config.split == ALL:
        _check_all(config, local)
    if config.output is not None:
        _check_output(config.output)
    paths = {"teacher": config.teacher, "model": config.model}
    paths = {name: path for name, path in paths.items() if path is not None}
    configs = {name: load_config(path, name) for name, path in paths.items()}
    tokenizer = load_tokenizer(config.model, "model", *configs.values())
    options = saved_labels(configs["model"]) if local else {}
    if config.split == ALL:
        options["validation_path"] = config.task
    workload = config.workload(config.task, tokenizer, config.max_length, **options)
    workload.judge(config.scored_split())
    held_out = config.split == "validation" and config.validation_path is None
    if local and held_out and Path(config.task).is_file():
        warnings.warn(
            "only the rows that training holds out count; --split all counts every row",
            stacklevel=2,
        )
    models = {}
    for name, path in paths.items():
        if workload.head == "labels" and head_of(configs[name]) != "labels":
            raise ValueError(
                f"{name}={path!r} has no head for labels of whole texts; fine-tune it on the task first."
            )
        models[name] = load_model(path, name, workload.head)
        if workload.task is not None:
            check_labels(models[name], workload.task, name)
    return lambda: _run(config, workload, models)


def _check_all(config: Config, local: bool) -> None:
    if not local or Path(config.task or "").is_dir():
        raise ValueError(
            f"split='all' is for a single file, and {config.task!r} has splits; name one of them."
        )
    for name in ("validation_path", "test_path"):
        if getattr(config, name) is not None:
            raise ValueError(f"split='all' scores {config.task!r}, which leaves no use for {name}.")


def _check_output(path: str) -> None:
    """Before minutes of work, not after them."""
    # The scores take the name's place: root would put them in that of /dev/null, or of the link /dev/stdout.
    place = Path(path)
    if not path or place.is_symlink() or (place.exists() and not place.is_file()):
        raise ValueError(f"output={path!r} is no plain file; name a JSON file.")
    folder = place.parent
    if not folder.is_dir():
        raise ValueError(f"output={path!r}: there is no folder {str(folder)!r}; make it first.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output={path!r}: the folder {str(folder)!r} cannot be written to.")


def _run(config: Config, workload: Workload, models: dict[str, Any]) -> None:
    from bertkd.study.files import write_json
    from bertkd.study.jobs import score_table
    from bertkd.training.machine import this_process

    process = this_process()
    judge = workload.judge(config.scored_split())
    scores = {}
    for name, model in models.items():
        model.to(process.device)
        if name == "teacher":
            workload.compare_with(model)
        scores[name] = {config.split: judge(model)}
    process.print(score_table(scores).text())
    if config.output is not None and process.is_main_process:
        write_json(config.output, {"task": workload.name, "scores": scores})
