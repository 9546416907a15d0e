"""Distilled against label-only students on ``pydocs-topic``: the two-stage recipe put to the test."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bertkd.distiller import Distiller
from bertkd.errors import NonFiniteError
from bertkd.student import create_student
from bertkd.study.files import held_output_dir, write_json
from bertkd.study.models import label_config, load_model, load_tokenizer, quiet_transformers
from bertkd.study.plots import check_can_draw
from bertkd.study.progress import Progress
from bertkd.study.stages import ticking
from bertkd.study.topic_report import Run, write_report
from bertkd.study.workload import Workload, judge_all, load_workload
from bertkd.training.exporting import export
from bertkd.training.loop import train
from bertkd.training.machine import this_process
from bertkd.training.recipe import Recipe, Stage
from bertkd.training.run_record import describe_data, identity
from bertkd.training.supervised import Supervised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

EVALUATIONS = 6


@dataclass(frozen=True)
class TopicStudy:
    """What to compare.

    Attributes:
        model: pretrained encoder to make the teacher of.
        recipe: gives task, the teacher's stage, what students are made of, and their two stages.
        output_dir: gets table, plot and results; finished runs in it are kept.
        seeds: students of each kind, with seeds 1, 2, ...
        teacher_steps: most updates of the teacher.
        student_steps: updates of each student; of two-stage students a third goes to the first.

    Raises:
        ValueError: the teacher's stage has no metric, so that its plateau cannot be told.
    """

    model: str
    recipe: Recipe
    output_dir: Path
    seeds: int = 3
    teacher_steps: int = 1500
    student_steps: int = 600

    def __post_init__(self) -> None:
        if self.recipe.teacher.metric is None:
            raise ValueError(
                "the recipe's teacher stage has metric: null, and nothing would tell its plateau: "
                "give it a metric, e.g. accuracy"
            )

    def teacher_stage(self) -> Stage:
        """The teacher's stage, cut to ``teacher_steps``; it stops early at its plateau."""
        steps = self.teacher_steps
        every = max(1, steps // (2 * EVALUATIONS))
        return _sized(self.recipe.teacher, steps, every)

    def methods(self) -> dict[str, tuple[Stage, ...]]:
        """Name -> stages; every method makes ``student_steps`` updates."""
        first, last = self.recipe.stages
        steps, part = self.student_steps, max(1, self.student_steps // 3)
        every = max(1, steps // EVALUATIONS)
        rest = max(1, steps - part)
        return {
            "labels only": (_sized(replace(last, objective="ce"), steps, every),),
            "kd": (_sized(last, steps, every),),
            f"{first.objective}, then kd": (_sized(first, part, None), _sized(last, rest, every)),
        }


@dataclass(frozen=True)
class _Attempt:
    """One training of the study; ``run.json`` in its folder says that it is finished.

    ``setting`` holds what else the outcome depends on; for a student that includes its teacher.
    """

    method: str
    seed: int
    stages: tuple[Stage, ...]
    folder: Path
    setting: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        stages = [stage.to_dict() for stage in self.stages]
        identity = {"method": self.method, "seed": self.seed, "stages": stages}
        # As it reads when it comes back: tuples are lists there.
        return json.loads(json.dumps({**identity, "setting": self.setting}))

    def finished(self) -> Run | None:
        path = self.folder / "run.json"
        if not path.is_file():
            return None
        saved = json.loads(path.read_text(encoding="utf-8"))
        # A field that another version did not write yet is another setting too.
        wanted = {field.name for field in fields(Run)}
        if not wanted <= saved.keys() or any(saved.get(k) != v for k, v in self.identity.items()):
            logger.warning("%s was made with other settings and is made anew", self.folder)
            return None
        return Run(**{name: saved[name] for name in wanted})

    def train(
        self,
        model: nn.Module,
        build: Callable[[Stage], nn.Module],
        workload: Workload,
        progress: Progress,
        teacher_scores: Mapping[str, float] | None = None,
        save: Callable[[], object] = lambda: None,
    ) -> Run:
        """Train and judge ``model``; ``save`` is called before the run counts as finished."""
        training, start = self.folder / "training", time.monotonic()
        shutil.rmtree(training, ignore_errors=True)
        total, done, taken = sum(stage.steps for stage in self.stages), 0, 0
        curve: list[tuple[int, float]] = []
        with progress.phase(self.name) as tick:
            for number, stage in enumerate(self.stages, start=1):
                module = build(stage)
                with ticking(module, total, tick, start=done):
                    result = train(
                        module,
                        stage,
                        workload.train,
                        output_dir=training / f"{number}-{stage.name}",
                        collate=workload.collate,
                        eval_fn=workload.judge("validation") if stage.metric else None,
                        seed=self.seed,
                        log_with=None,
                        teacher_score=(teacher_scores or {}).get(stage.metric or ""),
                        progress=False,
                    )
                seen = f"eval_{workload.metric}"
                curve += [(taken + row["step"], row[seen]) for row in result.history if seen in row]
                done, taken = done + stage.steps, taken + result.steps
            scores = judge_all(model, workload)
        shutil.rmtree(training)
        run = Run(self.method, self.seed, scores, taken, time.monotonic() - start, curve)
        # Killed in `save`, the run must leave no earlier record, which would pass for that of the files saved now.
        (self.folder / "run.json").unlink(missing_ok=True)
        save()
        write_json(self.folder / "run.json", {**asdict(run), **self.identity})
        return run


def run_topic(study: TopicStudy) -> list[Run]:
    """Train the teacher and all students, write and print the comparison.

    Students of one seed start from the same weights: blocks of the fine-tuned teacher and the same
    head. Each keeps the weights of its best validation score, and is judged on the test split.
    Where a student's loss turns NaN or infinite the others are trained and reported all the same.

    Raises:
        ValueError: the folder cannot be used or is in use, or the task is unlabelled or has no test split.
        NonFiniteError: the teacher failed; or students did, and the report holds the others.
    """
    check_can_draw()
    tokenizer = load_tokenizer(study.model, "model")
    workload = load_workload(study.recipe.task, tokenizer, study.recipe.max_length)
    if workload.task is None or "test" not in workload.judges:
        raise ValueError(
            f"task={study.recipe.task!r} has no labelled test split, and this study compares test "
            f"scores. Its splits: {', '.join(workload.judges)}."
        )
    stages = [stage for method in study.methods().values() for stage in method]
    for stage in (study.teacher_stage(), *stages):
        workload.check_metric(stage)
    with held_output_dir(study.output_dir, "study topic"):
        return _run(study, tokenizer, workload)


def _run(study: TopicStudy, tokenizer: Any, workload: Workload) -> list[Run]:
    setting = _setting(study, workload)
    lesson = _Attempt(
        "teacher",
        study.recipe.seed,
        (study.teacher_stage(),),
        study.output_dir / "teacher",
        setting,
    )
    making = {name: getattr(study.recipe, name) for name in ("layers", "hidden_size", "copy_head")}
    setting = {**setting, **making, "teacher": lesson.identity}
    attempts = [
        _Attempt(
            method,
            seed,
            stages,
            study.output_dir / f"{re.sub('[^a-z]+', '-', method)}-{seed}",
            setting,
        )
        for seed in range(1, study.seeds + 1)
        for method, stages in study.methods().items()
    ]
    found = {attempt.name: attempt.finished() for attempt in (lesson, *attempts)}
    todo = [attempt for attempt in (lesson, *attempts) if found[attempt.name] is None]
    progress = Progress({attempt.name: _cost(attempt) for attempt in todo})
    teacher, first = _teacher(study, lesson, found[lesson.name], tokenizer, workload, progress)
    runs, failed = [first], []
    for attempt in attempts:
        run = found[attempt.name]
        if run is None:
            student = create_student(teacher, **making, seed=attempt.seed, verbose=False)
            build = partial(_module, teacher, student, attempt.seed)
            lesson_scores = first.scores["validation"]
            try:
                run = attempt.train(student, build, workload, progress, lesson_scores)
            except NonFiniteError as error:
                failed.append(f"{attempt.name}: {error}")
                continue
        runs.append(run)
    progress.close()
    write_report(study.output_dir, workload, runs, failed)
    if failed:
        raise NonFiniteError(
            f"{len(failed)} of {len(attempts)} students failed ({'; '.join(failed)}); the report of "
            f"the others is in {study.output_dir}"
        )
    return runs


def _setting(study: TopicStudy, workload: Workload) -> dict[str, Any]:
    """What the teacher depends on besides its stage, as JSON-able values: not names, behind which things change."""
    splits = ("train", "validation", "test")
    rows = {split: getattr(workload.task, split) for split in splits}
    return {
        "model": identity(load_model(study.model, "model")),
        "task": study.recipe.task,
        "max_length": study.recipe.max_length,
        "data": {split: describe_data(found, found.lengths) for split, found in rows.items()},
    }


def _teacher(
    study: TopicStudy,
    lesson: _Attempt,
    run: Run | None,
    tokenizer: Any,
    workload: Workload,
    progress: Progress,
) -> tuple[PreTrainedModel, Run]:
    path, device = lesson.folder / "model", this_process().device
    if run is not None:
        return load_model(path, "teacher", "labels").to(device), run
    teacher = load_model(study.model, "model", "labels", **label_config(workload.task)).to(device)

    def save() -> None:
        with quiet_transformers():
            export(teacher, tokenizer, path, "# The teacher of the topic study")

    run = lesson.train(teacher, lambda _: Supervised(teacher), workload, progress, save=save)
    return teacher, run


def _module(teacher: nn.Module, student: nn.Module, seed: int, stage: Stage) -> nn.Module:
    if stage.objective == "ce":
        return Supervised(student)
    return Distiller(teacher, student, stage.objective, layer_map=stage.layer_map, seed=seed)


def _sized(stage: Stage, steps: int, eval_every: int | None) -> Stage:
    return replace(
        stage,
        steps=steps,
        epochs=None,
        eval_every=eval_every if stage.metric else None,
        save_every=None,
        keep_last=1,
    )


def _cost(attempt: _Attempt) -> float:
    # In forward passes of a student: a teacher has twice the blocks, a backward costs two forwards.
    pass_costs = {"teacher": 6.0, "labels only": 3.0}
    return pass_costs.get(attempt.method, 5.0) * sum(stage.steps for stage in attempt.stages)
