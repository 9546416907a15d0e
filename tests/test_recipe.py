"""Recipes: what is shipped, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

from bertkd.training import Recipe, Stage, recipe_names
from bertkd.training.fields import from_mapping
from bertkd.training.schedule import stage_lengths

# The released code's table: learning rate, batch size, updates, warmup. STS-B: fairseq's.
PAPER = {
    "mnli": (1e-5, 32, 123873, 7432),
    "qnli": (1e-5, 32, 33112, 1986),
    "qqp": (1e-5, 32, 113272, 28318),
    "rte": (2e-5, 16, 2036, 122),
    "sst2": (1e-5, 32, 20935, 1256),
    "mrpc": (1e-5, 16, 2296, 137),
    "cola": (1e-5, 16, 5336, 320),
    "stsb": (2e-5, 16, 3598, 214),
}


@pytest.mark.parametrize("task", PAPER)
def test_glue_recipes_hold_the_papers_settings(task):
    recipe = Recipe.load(task)
    assert recipe.task == task
    assert [stage.name for stage in recipe.stages] == ["intermediate", "prediction"]
    for stage in (*recipe.stages, recipe.teacher):
        assert (stage.lr, stage.batch_size, stage.steps, stage.warmup) == PAPER[task]
        assert stage.schedule == "polynomial"
    intermediate, prediction = recipe.stages
    # The second stage starts from the last checkpoint of the first.
    assert intermediate.restore == "last"
    assert prediction.metric == ("pearson" if task == "stsb" else "accuracy")


def test_stsb_says_that_it_is_not_the_papers():
    from bertkd.training.recipe import RECIPES

    text = (RECIPES / "stsb.yaml").read_text()
    assert "The paper leaves STS-B" in text


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_their_objectives_parse(name):
    from bertkd.objectives import read_objective

    recipe = Recipe.load(name)
    for stage in recipe.stages:
        read_objective(stage.objective)
    assert recipe.task == (None if name == "task-agnostic" else name)


def test_the_task_agnostic_recipe_holds_the_papers_settings():
    recipe = Recipe.load("task-agnostic")
    (stage,) = recipe.stages
    assert (stage.lr, stage.batch_size, stage.steps, stage.warmup) == (5e-4, 1024, 100_000, 0.06)
    assert (stage.schedule, stage.betas, stage.eps) == ("linear", (0.9, 0.98), 1e-6)
    assert (stage.weight_decay, stage.max_grad_norm) == (0.01, None)
    assert (recipe.max_length, recipe.layers, recipe.seed) == (128, "first:6", 43)


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{objective: kd, steps: 3, warmpu: 1}]", r"stages\[0\].*'warmpu'.*'warmup'"),
        ("stages: [{objective: kd, steps: 3}]\nseeds: 3", r"'seeds'.*Did you mean 'seed'"),
        ("every_stage: {lrr: 1}\nstages: [{objective: kd, steps: 3}]", r"'lrr'.*'lr'"),
        ("stages: [{steps: 3}]", r"'objective' is missing"),
        ("stages: [{objective: kd}]", "exactly one of steps and epochs"),
        ("stages: [{objective: kd, steps: 3, epochs: 1}]", "exactly one of steps and epochs"),
        ("stages: [{objective: kd, steps: many}]", r"stages\[0\].steps: expected int, got 'many'"),
        ("stages: [{objective: kd, steps: 2.5}]", r"steps: expected int"),
        ("stages: [{objective: kd, steps: true}]", r"steps: expected int"),
        ("stages: [{objective: kd, steps: 3, schedule: linaer}]", "Did you mean 'linear'"),
        ("stages: [{objective: kd, steps: 3, precision: fp8}]", "'fp8'"),
        ("stages: [{objective: kd, steps: 3, eval_every: epok}]", "eval_every: cannot use 'epok'"),
        ("stages: [{objective: kd, steps: 3, betas: [0.9]}]", "expected 2 values"),
        ("stages: [{objective: kd, steps: 3, betas: [0.9, 1.0]}]", r"betas must lie in \[0, 1\)"),
        ("stages: [{objective: kd, steps: 3, lr: 0}]", "lr must be positive, got 0"),
        ("stages: [{objective: kd, steps: 3, lr: .nan}]", "lr must be positive"),
        ("stages: [{objective: kd, steps: 0}]", "steps must be positive"),
        ("stages: [{objective: kd, epochs: -1}]", "epochs must be positive"),
        ("stages: [{objective: kd, steps: 3, warmup: 1.5}]", "share below 1"),
        ("stages: [{objective: kd, steps: 3, lr_end: 1.0}]", r"lr_end must lie in \[0, lr\)"),
        ("stages: [{objective: kd, steps: 3, batch_size: 10, accumulate: 4}]", "multiple of"),
        ("stages: [{objective: kd, steps: 3, patience: 2}]", "patience needs metric"),
        ("stages: [{objective: kd, steps: 3, name: a/b}]", "name must be usable as a folder"),
        ("stages: [{objective: ' ', steps: 3}]", "objective is empty"),
        ("stages: [{objective: kd, steps: 3}, {objective: kd, steps: 3}]", "a name of its own"),
        ("stages: []", "stages is empty"),
        ("stages: kd", "stages must be a list"),
        ("every_stage: 3\nstages: [{objective: kd, steps: 3}]", "every_stage must be keys and"),
        ("- a", "expected keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load(write(tmp_path, text))


def test_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown recipe 'mnlli'\. Did you mean 'mnli'"):
        Recipe.load("mnlli")
    with pytest.raises(ValueError, match="no such recipe file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "recipe.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe\.yaml is not YAML: .*utf-8"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_every_stage_is_shared_and_can_be_overridden(tmp_path):
    text = """
every_stage: {lr: 1e-4, steps: 10, warmup: 2}
teacher: {objective: ce, epochs: 2, warmup: 0.1}
stages:
  - {name: one, objective: att_kl}
  - {name: two, objective: kd, lr: 2.0e-4, steps: 5}
"""
    recipe = Recipe.load(write(tmp_path, text))
    assert [stage.lr for stage in recipe.stages] == [1e-4, 2e-4]  # 1e-4 is text to YAML
    assert [stage.steps for stage in recipe.stages] == [10, 5]
    assert (recipe.teacher.epochs, recipe.teacher.steps) == (2.0, None)
    assert isinstance(recipe.stages[0].warmup, int)
    assert isinstance(recipe.teacher.warmup, float)


def test_with_stages_changes_all_of_them():
    recipe = Recipe.load("rte").with_stages(epochs=0.5, warmup=0.1, precision="bf16")
    assert all(stage.steps is None and stage.epochs == 0.5 for stage in recipe.stages)
    assert all(stage.precision == "bf16" for stage in recipe.stages)
    with pytest.raises(ValueError, match=r"unknown stage field 'epoch'\. Did you mean 'epochs'"):
        recipe.with_stages(epoch=1)


def test_a_stage_survives_json():
    stage = Recipe.load("cola").stages[1]
    assert from_mapping(Stage, json.loads(json.dumps(stage.to_dict())), "stage") == stage


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 2.5}, r"steps: expected int, got 2\.5"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"batch_size": 8.0}, r"batch_size: expected int, got 8\.0"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"weight_decay": "a"}, "weight_decay: expected float, got 'a'"),
        ({"betas": (0.9,)}, "betas: expected 2 values"),
        ({"warmup": math.nan}, "warmup must be a number of updates.*got nan"),
        ({"eval_every": 2.5}, r"eval_every: cannot use 2\.5, expected int or 'epoch'"),
        ({"objective": None}, "objective: expected str, got None"),
        ({"maximize": "no"}, "maximize: expected bool, got 'no'"),
        ({"schedule": "linaer"}, "schedule: unknown value 'linaer'. Did you mean 'linear'"),
        ({"precision": "fp8"}, "precision: unknown value 'fp8'"),
    ],
)
def test_a_stage_made_in_python_is_as_strict(values, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{"objective": "kd", "steps": 3} | values)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Recipe(stages=(Stage(objective="kd", steps=3),), seed=-1)
    with pytest.raises(ValueError, match=r"seed: expected int, got 1\.5"):
        Recipe(stages=(Stage(objective="kd", steps=3),), seed=1.5)


def test_fractions_of_an_epoch_are_not_rounded_up_by_float_noise():
    def updates(epochs, per_epoch):
        return stage_lengths(Stage(objective="kd", epochs=epochs), per_epoch).total

    assert [updates(tenths / 10, 100) for tenths in range(1, 90)] == list(range(10, 900, 10))
    assert [updates(x, 10) for x in (0.01, 0.11, 1e-9)] == [1, 2, 1]
