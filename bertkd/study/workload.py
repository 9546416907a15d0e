"""What models are trained and judged on: a labelled task, retrieval, or plain text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from bertkd.data import (
    Collator,
    MaskingCollator,
    TaskData,
    is_built_in,
    load_blocks,
    load_retrieval,
    load_task,
    open_corpus,
)
from bertkd.data.encode import EncodedRows, encode_rows
from bertkd.data.tables import Table
from bertkd.encoders import unwrap
from bertkd.errors import NonFiniteError
from bertkd.study.models import class_names
from bertkd.study.retrieval import RetrievalJudge
from bertkd.training.evaluate import predict
from bertkd.training.metrics import check_computable, compute_metrics

if TYPE_CHECKING:
    from bertkd.training.recipe import Stage

RETRIEVAL = "pydocs-retrieval"

Judge = Callable[[nn.Module], dict[str, float]]
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Workload:
    """Training rows, how to batch them, and how to judge a model.

    Attributes:
        name: of the task or the text.
        head: the head that models need: ``"labels"``, ``"mlm"``, or ``None`` for bare encoders.
        train: encoded training rows.
        collate: rows to a batch of tensors.
        judges: split -> function from a model to its scores by name; empty for plain text.
        metric: the score that says which checkpoint is best.
        task: the labelled task, where it is one.
        metrics: names of all scores.
    """

    name: str
    head: str | None
    train: EncodedRows
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]
    judges: Mapping[str, Judge] = field(default_factory=dict)
    metric: str | None = None
    task: TaskData | None = None
    metrics: tuple[str, ...] = ()

    def judge(self, split: str) -> Judge:
        """The judge of one split.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self.judges:
            known = ", ".join(self.judges) or "none"
            raise ValueError(
                f"split={split!r}: {self.name} has no such split. Its splits: {known}."
            )
        return self.judges[split]

    def check_metric(self, stage: Stage) -> None:
        """Refuse a stage that is to be judged by a score that there will not be.

        Raises:
            ValueError: naming the stage, its ``metric`` and the scores that there are.
        """
        if stage.metric is None or stage.eval_every is None or stage.metric in self.metrics:
            return
        has, remedy = "nothing to score with", "metric: null"
        if self.metrics:
            has, remedy = ", ".join(self.metrics), f"{remedy}, or one of them"
        raise ValueError(
            f"stage {stage.name!r} is to be judged by metric={stage.metric!r}, but {self.name} has {has}; "
            f"give the stage {remedy}."
        )

    def compare_with(self, teacher: nn.Module) -> None:
        """Let the judges of sentence embeddings compare with this teacher's similarities."""
        for judge in self.judges.values():
            if isinstance(judge, RetrievalJudge):
                judge.teacher = judge.similarities(teacher)


def is_local(task: str) -> bool:
    """Whether a task is the user's own file or folder, whose labels may be read as a model names them."""
    return not is_built_in(task) and task != RETRIEVAL


def load_workload(task: str, tokenizer: Any, max_length: int, **columns: Any) -> Workload:
    """A task by name or path.

    Args:
        task: ``"pydocs-retrieval"``, or what ``bertkd.data.load_task`` takes.
        tokenizer: of the models.
        max_length: tokens per example at most.
        columns: further arguments of ``load_task``; those that are ``None`` are left out.

    Raises:
        ValueError, FileNotFoundError: as ``load_task``.
    """
    columns = {name: value for name, value in columns.items() if value is not None}
    if task == RETRIEVAL:
        if columns:
            raise ValueError(f"{', '.join(columns)}: for labelled tasks only, not for {task!r}.")
        return _retrieval(tokenizer, max_length)
    data = load_task(task, tokenizer=tokenizer, max_length=max_length, **columns)
    check_computable(data.metric_names)
    splits = {"validation": data.validation, "test": data.test, **data.extra_validation}
    collate = Collator(tokenizer)
    judges = {
        name: _label_judge(data, rows, collate) for name, rows in splits.items() if rows is not None
    }
    return Workload(
        data.name,
        "labels",
        data.train,
        collate,
        judges,
        data.primary_metric,
        data,
        metrics=data.metric_names,
    )


def load_text(source: str, tokenizer: Any, max_length: int, *, masked: bool = False) -> Workload:
    """Unlabelled text in blocks of ``max_length`` tokens, for task-agnostic distillation.

    Args:
        source: what ``bertkd.data.open_corpus`` takes: a text file, a folder of them, ``"pydocs"``.
        tokenizer: of the models.
        max_length: tokens per block.
        masked: hide some of the words and make them the labels, for models with that head.

    Raises:
        ValueError, FileNotFoundError: as ``open_corpus`` and ``load_blocks``.
    """
    blocks = load_blocks(open_corpus(source), tokenizer, max_length)
    if masked:
        return Workload(source, "mlm", blocks, MaskingCollator(tokenizer))
    return Workload(source, None, blocks, Collator(tokenizer))


def judge_all(model: nn.Module, workload: Workload, role: str = "model") -> Scores:
    """Split -> score name -> value.

    Raises:
        NonFiniteError: the model, which the message calls by its ``role``, computes NaN or infinity.
    """
    scores = {}
    for split, judge in workload.judges.items():
        try:
            scores[split] = judge(model)
        except NonFiniteError as error:
            raise NonFiniteError(f"the {role} on {split}: {error}") from error
    return scores


def encode_texts(texts: list[str], name: str, tokenizer: Any, max_length: int) -> EncodedRows:
    """Texts as training rows without labels."""
    table = Table({"text": texts}, ((name, len(texts)),))
    return encode_rows(table, "text", tokenizer=tokenizer, max_length=max_length)


def check_labels(model: nn.Module, task: TaskData, role: str = "model") -> None:
    """Refuse a model whose labels are not the task's, in the task's order.

    Where the model does not name its classes (``LABEL_0``, ...), the order is taken on trust, with a
    warning. ``role`` is what the messages call the model.

    Raises:
        ValueError: another number of labels, other names or another order, or several labels a row.
    """
    if _refuse_others(model, task, role):
        taken = [f"LABEL_{number} for {name!r}" for number, name in enumerate(task.label_names)]
        more = f", ... ({len(taken)} in all)" if len(taken) > 12 else ""
        warnings.warn(
            f"the {role} does not name its classes: taking {', '.join(taken[:12])}{more}; if that is "
            "another order, name them in its config.json (id2label)",
            stacklevel=2,
        )


def _refuse_others(model: nn.Module, task: TaskData, role: str) -> bool:
    """Raises as ``check_labels`` does; whether the order of the classes is taken on trust."""
    config: Any = getattr(unwrap(model), "config", None)
    if config is None:
        return False
    if config.num_labels != task.num_labels:
        raise ValueError(
            f"the {role} predicts {config.num_labels} labels, task {task.name} has "
            f"{task.num_labels}: fine-tune a {role} on this task"
        )
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            f"the {role} may give a row several labels (problem_type={config.problem_type!r}), task {task.name} "
            f"gives it one: fine-tune a {role} on this task"
        )
    names = class_names(config)
    if task.label_names and names not in (None, list(task.label_names)):
        raise ValueError(
            f"the {role}'s labels are {', '.join(names)}, those of task {task.name} "
            f"{', '.join(task.label_names)}: another order or other classes, so that its scores "
            f"would mean nothing. Fine-tune a {role} on this task."
        )
    # Labels 0, 1, ... are the model's class numbers: nothing is assumed.
    numbers = tuple(map(str, range(task.num_labels)))
    return names is None and task.label_names not in ((), numbers)


def _label_judge(data: TaskData, rows: EncodedRows, collate: Collator) -> Judge:
    def judge(model: nn.Module) -> dict[str, float]:
        # Called many times in a training, so it must not warn.
        _refuse_others(model, data, "model")
        logits, labels = predict(model, rows, collate)
        return compute_metrics(data.metric_names, logits, labels)

    return judge


def _retrieval(tokenizer: Any, max_length: int) -> Workload:
    splits = {split: load_retrieval(split=split) for split in ("validation", "test")}
    judges = {
        split: RetrievalJudge(data.queries, data.documents, tokenizer)
        for split, data in splits.items()
    }
    texts = splits["validation"].train_texts
    rows = encode_texts(texts, RETRIEVAL, tokenizer, max_length)
    names = ("mrr", "top1", "spearman")
    return Workload(RETRIEVAL, None, rows, Collator(tokenizer), judges, "mrr", metrics=names)
