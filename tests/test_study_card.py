"""The model card: what Hugging Face reads of it, and that it says nothing that is not known."""

import dataclasses
import re

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_task import save_tiny_model

from bertkd.study.card import (
    CLASSIFIER_USAGE,
    ENCODER_USAGE,
    SENTENCE_USAGE,
    CardFacts,
    duration,
    model_card,
    teacher_facts,
)
from bertkd.study.table import Table

FACTS = CardFacts(
    name="small model",
    path="./small",
    teacher="big model",
    summary="A small model.",
    recipe={"objective": "`att_kl`", "seed": 3},
    scores=Table(["model", "MRR"], [["student", "0.41"]]),
    results={"mrr": 0.41234567},
    dataset="pydocs-retrieval",
    task="sentence-similarity",
    cost={"training time": duration(250)},
    usage=SENTENCE_USAGE,
    base_model="someone/big",
    license="apache-2.0",
    language="en",
)


def test_front_matter_is_what_hugging_face_reads(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card(FACTS), encoding="utf-8")
    data = ModelCard.load(path).data
    assert (data.base_model, data.license, data.language) == ("someone/big", "apache-2.0", "en")
    assert data.library_name == "transformers"
    result = data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("mrr", 0.4123)
    # The card of one model is where that of its own students takes these from.
    assert teacher_facts(tmp_path) == {"license": "apache-2.0", "language": "en"}


def test_everything_is_in_the_text():
    text = model_card(FACTS)
    for part in (
        "# small model",
        "A small model.",
        "big model",
        "`att_kl`",
        "| student |",
        "4:10 (min:s)",
    ):
        assert part in text
    assert "{path}" not in text


def test_what_is_not_known_is_not_made_up(tmp_path):
    text = model_card(dataclasses.replace(FACTS, base_model=None, license=None, language=None))
    front = text.split("---")[1]
    assert not re.search("base_model|license|language", front)
    assert "not stated" in text
    assert teacher_facts(tmp_path) == {"license": None, "language": None}
    (tmp_path / "README.md").write_text("# no front matter")
    assert teacher_facts(tmp_path) == {"license": None, "language": None}


@pytest.mark.parametrize(
    ("usage", "head", "name", "shape"),
    [
        (SENTENCE_USAGE, None, "embeddings", (2, 32)),
        (ENCODER_USAGE, None, "states", (1, 5, 32)),
        (CLASSIFIER_USAGE, "sequence", "logits", (1, 3)),
    ],
)
def test_usage_runs_as_printed(usage, head, name, shape, tmp_path):
    path = save_tiny_model(tmp_path / 'a "model" of \\', layers=2, head_cls=head)
    text = model_card(dataclasses.replace(FACTS, usage=usage, path=path))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    found = {}
    exec(code, found)
    value = found[name]
    assert len(value.shape) == len(shape)
    assert (value.shape[0], value.shape[-1]) == (shape[0], shape[-1])
    assert torch.isfinite(value).all()
