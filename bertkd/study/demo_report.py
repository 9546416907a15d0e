"""What the demo found, as tables, plots, results.json, model card and checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bertkd.plan import human_bytes
from bertkd.study.card import SENTENCE_USAGE, CardFacts, duration, model_card, teacher_facts
from bertkd.study.costs import Costs
from bertkd.study.demo_result import DemoResult, SeedResult
from bertkd.study.files import write_json, write_text
from bertkd.study.models import quiet_transformers
from bertkd.study.plots import plot_losses, plot_score_bars, plot_score_curves
from bertkd.study.stages import loss_curves, score_curves, stage_facts
from bertkd.study.table import Table, human_time, mean_std
from bertkd.study.workload import RETRIEVAL
from bertkd.training.exporting import export

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER_NAME = "sentence-transformers/all-MiniLM-L6-v2"
KEPT_MRR, SPEARMAN = 0.95, 0.90
SCORES = {"mrr": "MRR", "top1": "top-1", "spearman": "Spearman"}
# With these beside the weights sentence-transformers loads the folder as it loads the teacher's.
SENTENCE_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling",
)


def score_table(result: DemoResult, runs: list[SeedResult]) -> Table:
    """Scores, size and speed of teacher, start and the students of ``runs``."""
    table = Table(["model", *SCORES.values(), "blocks", "parameters", "latency", "speed-up"])
    costs = result.costs
    for name, scores in _scores_by_model(result, runs).items():
        kind = "teacher" if name == "teacher" else "student"
        seconds = costs.latency.seconds[kind]
        table.add(
            name,
            *(mean_std([found[key] for found in scores]) for key in SCORES),
            str(costs.blocks[kind]),
            f"{costs.parameters[kind] / 1e6:.1f} M",
            f"{1000 * seconds:.0f} ms",
            f"{costs.latency.seconds['teacher'] / seconds:.2f}x",
        )
    return table


def _scores_by_model(
    result: DemoResult, runs: list[SeedResult]
) -> dict[str, list[dict[str, float]]]:
    return {
        "teacher": [result.teacher],
        "undistilled student": [result.undistilled],
        "distilled student": [run.scores for run in runs],
    }


def memory_table(costs: Costs) -> Table:
    """Peak extra memory of the attention loss, eager against fused."""
    table = Table(["attention_kl, one pair of blocks", "eager", "fused", "fused / eager"])
    for row in costs.loss_memory:
        shape = f"{row.batch} texts x {row.length} tokens, {row.heads} heads of {row.head_dim}"
        share = f"{row.fused / row.eager:.0%}"
        table.add(shape, human_bytes(row.eager), human_bytes(row.fused), share)
    return table


def write_run(
    result: DemoResult,
    run: SeedResult,
    student: PreTrainedModel,
    tokenizer: Any,
    teacher_dir: Path,
    folder: Path,
) -> None:
    """Curves, checkpoint and card of one run, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = result.recipe.stages[0]
    title = f"MiniLM-L6 to {result.costs.blocks['student']} layers, seed {run.seed}"
    plot_losses(loss_curves(run.history), folder / "loss.png", f"{title}: {stage.objective}")
    curves, references = {}, {}
    for key, (steps, values) in score_curves(run.history).items():
        name = SCORES[key]
        curves[name] = ([0, *steps], [result.curve_start[key], *values])
        references[name] = {"teacher": result.curve_teacher[key]}
    plot_score_curves(
        curves, folder / "scores.png", f"{title}: validation queries", references=references
    )
    path = folder / "student"
    with quiet_transformers():
        export(student, tokenizer, path, _card(result, run, teacher_dir, path))
    for name in SENTENCE_FILES:
        if (teacher_dir / name).is_dir():
            shutil.copytree(teacher_dir / name, path / name, dirs_exist_ok=True)
        elif (teacher_dir / name).is_file():
            shutil.copy2(teacher_dir / name, path / name)


def write_report(result: DemoResult, output_dir: Path) -> None:
    """``results.json``, ``report.md`` and the bars of all runs; prints the tables."""
    bars = {
        model: {name: [found[key] for found in scores] for key, name in SCORES.items()}
        for model, scores in _scores_by_model(result, result.runs).items()
    }
    title = f"{RETRIEVAL}: {result.queries} held-out queries, {_seeds(result)}"
    plot_score_bars(bars, output_dir / "bars.png", title)
    write_json(output_dir / "results.json", result.as_dict())
    tables = [score_table(result, result.runs), memory_table(result.costs)]
    notes = _notes(result)
    report = [f"# {title}", tables[0].markdown(), notes[0], tables[1].markdown(), *notes[1:]]
    write_text(output_dir / "report.md", "\n\n".join(report) + "\n")
    print(f"\n{title}\n\n{tables[0].text()}\n{notes[0]}\n\n{tables[1].text()}\n")
    print("\n".join(notes[1:]))
    names = sorted(path.name for path in output_dir.iterdir() if not path.name.startswith("."))
    print(f"\nwritten to {output_dir}: {', '.join(names)}")


def _notes(result: DemoResult) -> list[str]:
    latency = result.costs.latency
    conditions = (
        f"Latency: one batch of {result.costs.latency_batch} docstrings, median of {latency.rounds} "
        f"interleaved runs, {latency.device}, {latency.threads} threads."
    )
    kept, rho = result.kept_mrr, result.spearman
    verdict = "reached" if kept >= KEPT_MRR and rho >= SPEARMAN else "MISSED"
    return [
        conditions,
        f"The student keeps {kept:.1%} of the teacher's MRR and agrees with its similarities at "
        f"Spearman {rho:.3f}, {_seeds(result)}. Target, {KEPT_MRR:.0%} and {SPEARMAN:.2f}: {verdict}.",
        f"{result.texts:,} unlabelled training texts, none of them from the code that the queries are about. "
        f"Training took {human_time(fmean(run.seconds for run in result.runs))} min per seed, "
        f"everything {human_time(result.seconds)} min.",
    ]


def _seeds(result: DemoResult) -> str:
    count = len(result.runs)
    return f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"


def _card(result: DemoResult, run: SeedResult, teacher_dir: Path, path: Path) -> str:
    recipe, costs = result.recipe, result.costs
    blocks = f"{costs.blocks['student']} of the teacher's {costs.blocks['teacher']} blocks"
    latency = costs.latency
    return model_card(
        CardFacts(
            name=f"MiniLM-L{costs.blocks['student']} distilled on docstrings",
            path=str(path),
            teacher=TEACHER_NAME,
            summary=f"A sentence encoder of {blocks}, distilled without labels on the docstrings and "
            "signatures of the Python standard library. Embeddings are mean-pooled, as the teacher's.",
            recipe={
                "student made of": f"the teacher's blocks `{recipe.layers}`",
                **stage_facts(recipe.stages),
                "text": f"{result.texts:,} docstrings and signatures, {recipe.max_length} tokens at most",
                "seed": run.seed,
            },
            scores=score_table(result, [run]),
            results={SCORES[key]: value for key, value in run.scores.items()},
            dataset=RETRIEVAL,
            task="sentence-similarity",
            cost={
                "training time": duration(run.seconds),
                "hardware": f"{latency.device}, {latency.threads} threads",
            },
            usage=SENTENCE_USAGE,
            base_model=TEACHER_NAME,
            limits=[
                "Trained for minutes on one kind of text, English docstrings: a demonstration. Measure "
                "it on your own text before relying on it.",
            ],
            **teacher_facts(teacher_dir),
        )
    )
