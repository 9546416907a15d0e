"""Model cards: the README.md beside a distilled checkpoint, in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import bertkd
from bertkd.study.table import Table, human_time

SENTENCE_USAGE = """```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModel.from_pretrained("{path}").eval()
batch = tokenizer(["a first text", "another one"], padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
similarity = embeddings[0] @ embeddings[1]
```"""

ENCODER_USAGE = """```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModel.from_pretrained("{path}").eval()
states = model(**tokenizer("a text", return_tensors="pt")).last_hidden_state
```"""

CLASSIFIER_USAGE = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForSequenceClassification.from_pretrained("{path}").eval()
logits = model(**tokenizer("a text", return_tensors="pt")).logits
```"""


# What is said of a task head that no stage trains, by where it comes from.
_REMEDY = "To train it, add kd or ce to the objective, or a stage with one of them."
UNTRAINED = {
    "new": "No stage trains the task head, which is new: what it puts out means nothing and is not scored. "
    + _REMEDY,
    "copied": "No stage trains the task head: the scores are those of the copy that the student started with. "
    + _REMEDY,
}


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says; nothing in it is made up by the card.

    Attributes:
        name: of the model.
        path: what users pass to ``from_pretrained``.
        teacher: name of the teacher, for people.
        summary: one or two sentences on what the model is.
        recipe: setting -> value, in the order to show.
        scores: table of teacher, baselines and student.
        results: metric -> the student's own value, for the metadata.
        dataset: name of the evaluation data.
        task: Hugging Face's name of the task, e.g. ``"sentence-similarity"``.
        cost: what the training took, e.g. ``{"training time": "4:10"}``.
        usage: one of the ``*_USAGE`` texts.
        base_model: the teacher's name on the Hugging Face Hub, where it has one.
        license, language: the teacher's, where they are known.
        limits: sentences on what the model is not good for.
    """

    name: str
    path: str
    teacher: str
    summary: str
    recipe: Mapping[str, object]
    scores: Table
    results: Mapping[str, float]
    dataset: str
    task: str
    cost: Mapping[str, str]
    usage: str
    base_model: str | None = None
    license: str | None = None
    language: str | None = None
    limits: list[str] = field(default_factory=list)


def model_card(facts: CardFacts) -> str:
    """The README.md: YAML front matter with results as Hugging Face reads them, then Markdown."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=facts.dataset,
            dataset_name=facts.dataset,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in facts.results.items()
    ]
    front = ModelCardData(
        language=facts.language,
        license=facts.license,
        base_model=facts.base_model,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=["knowledge-distillation", "bertkd"],
        model_name=facts.name,
        eval_results=results,
    )
    license_line = (
        f"`{facts.license}`, as the teacher's."
        if facts.license
        else "The teacher's; not stated there."
    )
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {facts.name}",
        facts.summary,
        "## Use",
        facts.usage.replace('"{path}"', json.dumps(facts.path, ensure_ascii=False)),
        f"## Scores on `{facts.dataset}`",
        facts.scores.markdown(),
        "## Recipe",
        _list({"teacher": facts.teacher, **facts.recipe}),
        "## Cost",
        _list(facts.cost),
        *(["## Limits", "\n".join(f"- {limit}" for limit in facts.limits)] if facts.limits else []),
        "## Licence",
        license_line,
        f"Made with bertkd {bertkd.__version__}.",
    ]
    return "\n\n".join(sections) + "\n"


def teacher_facts(folder: str | Path) -> dict[str, str | None]:
    """``license`` and ``language`` from the front matter of the teacher's own card, if it has one."""
    from huggingface_hub import ModelCard

    facts: dict[str, str | None] = {"license": None, "language": None}
    path = Path(folder) / "README.md"
    if not path.is_file():
        return facts
    try:
        data = ModelCard.load(path).data.to_dict()
    except ValueError:  # a README without valid front matter is none of our business
        return facts
    return {name: data.get(name) if isinstance(data.get(name), str) else None for name in facts}


def duration(seconds: float) -> str:
    """``"4:10 (min:s)"`` or ``"1:02:03 (h:min:s)"``."""
    return f"{human_time(seconds)} ({'h:min:s' if seconds >= 3600 else 'min:s'})"


def _list(values: Mapping[str, object]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())
