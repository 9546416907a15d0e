"""One training from checked parts to a finished model with its scores, plots and card."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

import bertkd
from bertkd._files import clear_leftovers
from bertkd.plan import count_parameters
from bertkd.study.card import (
    CLASSIFIER_USAGE,
    ENCODER_USAGE,
    SENTENCE_USAGE,
    UNTRAINED,
    CardFacts,
    duration,
    model_card,
    teacher_facts,
)
from bertkd.study.files import claim_output_dir, write_json
from bertkd.study.models import quiet_transformers
from bertkd.study.plots import check_can_draw, plot_losses, plot_score_curves
from bertkd.study.stages import loss_curves, run_stages, score_curves, stage_facts
from bertkd.study.table import Table
from bertkd.study.workload import RETRIEVAL, Scores, Workload, judge_all
from bertkd.training.exporting import export
from bertkd.training.loop import TrainResult
from bertkd.training.machine import this_process
from bertkd.training.recipe import Stage


@dataclass(kw_only=True)
class Job:
    """A training whose parts have been built and checked.

    Attributes:
        command: ``"distill"`` or ``"finetune"``; signs the output folder.
        source: name or folder of the teacher, or of the pretrained model.
        student: the model that is trained.
        tokenizer: its tokenizer.
        stages: what to do, in order.
        build: stage to the module that the loop trains; all hold ``student``.
        workload: data and judges.
        output_dir: gets ``model/``, ``results.json``, plots and the stages' folders.
        teacher: to be scored beside the student; ``None`` for fine-tuning.
        facts: further lines for the card's recipe, e.g. which blocks the student is made of.
        settings: what must be the same when the run is resumed, as ``train`` takes it.
        untrained_head: ``"new"`` or ``"copied"``, a key of ``UNTRAINED``, where no stage trains the head that
            the workload asks for: the outputs of a new one are not scored.
        seed: of the order of the data and dropout.
        resume: as ``train`` takes it.
        log_with: trackers, as ``train`` takes them.
    """

    command: str
    source: str
    student: nn.Module
    tokenizer: Any
    stages: tuple[Stage, ...]
    build: Callable[[Stage], nn.Module]
    workload: Workload
    output_dir: Path
    teacher: nn.Module | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    untrained_head: Literal["new", "copied"] | None = None
    seed: int = 0
    resume: bool | str = False
    log_with: str | None = "tensorboard"

    def __post_init__(self) -> None:
        check_can_draw()


def run_job(job: Job) -> Path:
    """Train, judge, and write everything; returns the folder of the finished model.

    Raises:
        ValueError: the output folder cannot be used.
        CheckpointError, NonFiniteError: as ``train``.
        OSError: what comes of the training could not be written.
    """
    state = this_process()
    workload, scores = job.workload, {}
    # All processes must have looked at the folder before one of them signs it.
    state.wait_for_everyone()
    if state.is_main_process:
        claim_output_dir(job.output_dir, job.command, reuse=bool(job.resume))
    if job.teacher is not None:
        workload.compare_with(job.teacher.to(state.device))
        scores["teacher"] = judge_all(job.teacher, workload, "teacher")
    results = run_stages(
        job.stages,
        job.build,
        workload,
        output_dir=job.output_dir,
        resume=job.resume,
        seed=job.seed,
        log_with=job.log_with,
        settings=job.settings,
        teacher_scores=scores.get("teacher", {}).get("validation"),
    )
    role = "student" if job.teacher is not None else "model"
    scores[role] = {} if job.untrained_head == "new" else judge_all(job.student, workload, role)
    path = job.output_dir / "model"
    if state.is_main_process:
        try:
            _write(job, results, scores, path)
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"{job.output_dir} is not complete ({error}). The training has ended and is kept in "
                "its checkpoints: remedy that, and --resume writes what is missing",
            ) from error
    state.wait_for_everyone()
    return path


def score_table(scores: Mapping[str, Scores]) -> Table:
    """One row per model, one column per split and score; "-" where a model has none."""
    columns = list(
        dict.fromkeys((split, name) for s in scores.values() for split in s for name in s[split])
    )
    table = Table(["model", *(f"{split} {name}" for split, name in columns)])
    for model, by_split in scores.items():
        cells = [by_split.get(split, {}).get(name) for split, name in columns]
        table.add(model, *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


def _write(job: Job, results: list[TrainResult], scores: Mapping[str, Scores], path: Path) -> None:
    # By now the stages' locks have shown that no other run is at work here.
    clear_leftovers(job.output_dir, "")
    done = list(zip(job.stages, results, strict=True))
    seconds = {stage.name: result.seconds for stage, result in done}
    for number, (stage, result) in enumerate(done, start=1):
        title = f"{stage.name}: {stage.objective}"
        # A stage that patience stopped before its first row has none.
        if losses := loss_curves(result.history):
            plot_losses(losses, job.output_dir / f"{number}-{stage.name}.png", title)
        if curves := score_curves(result.history):
            plot_score_curves(curves, job.output_dir / f"{number}-{stage.name}-scores.png", title)
    table = score_table(scores)
    write_json(
        job.output_dir / "results.json",
        {
            "command": job.command,
            "source": job.source,
            "task": job.workload.name,
            "stages": [stage.to_dict() for stage in job.stages],
            "seed": job.seed,
            "scores": scores,
            "steps": {stage.name: result.steps for stage, result in done},
            "seconds": seconds,
            "parameters": count_parameters(job.student),
            "bertkd": bertkd.__version__,
        },
    )
    card = _card(job, scores, table, sum(seconds.values()), path)
    with quiet_transformers():
        export(job.student, job.tokenizer, path, card)
    if table.rows and len(table.header) > 1:
        print(table.text())
    if job.untrained_head is not None:
        print(UNTRAINED[job.untrained_head])
    print(f"model: {path}")


def _card(job: Job, scores: Mapping[str, Scores], table: Table, seconds: float, path: Path) -> str:
    head = None if job.untrained_head == "new" else job.workload.head
    distilled = job.teacher is not None
    own = scores["student" if distilled else "model"]
    split = "test" if "test" in own else next(iter(own), None)
    usages = {"labels": CLASSIFIER_USAGE, "mlm": ENCODER_USAGE}
    usage = SENTENCE_USAGE if job.workload.name == RETRIEVAL else usages.get(head, ENCODER_USAGE)
    tasks = {"labels": "text-classification", "mlm": "fill-mask"}
    verb = "distilled from" if distilled else "fine-tuned from"
    hub_name = None if Path(job.source).exists() else job.source
    return model_card(
        CardFacts(
            name=job.output_dir.resolve().name,
            path=str(path),
            teacher=job.source if hub_name else Path(job.source).resolve().name,
            summary=f"An encoder of {count_parameters(job.student) / 1e6:.1f} million parameters, "
            f"{verb} the model below on `{job.workload.name}`.",
            recipe={**job.facts, **stage_facts(job.stages), "seed": job.seed},
            scores=table,
            results=own[split] if split else {},
            dataset=job.workload.name,
            task=tasks.get(head, "feature-extraction"),
            cost={"training time": duration(seconds), "device": str(this_process().device)},
            usage=usage,
            base_model=hub_name,
            limits=[UNTRAINED[job.untrained_head]] if job.untrained_head is not None else [],
            **teacher_facts(job.source),
        )
    )
