"""The topic study: what it concludes, what it keeps of earlier runs, and what it makes anew."""

import dataclasses
import json
import shutil
import sys

import pytest
from other_run import other_run_in
from tiny_task import save_reviews, save_tiny_model

from bertkd.cli.main import main
from bertkd.errors import NonFiniteError
from bertkd.student import create_student
from bertkd.study import topic
from bertkd.study.topic_report import Run, findings, group, method_table
from bertkd.training.recipe import Recipe


def run(method, seed, accuracy, validation=None):
    scores = {"validation": {"accuracy": validation or accuracy}, "test": {"accuracy": accuracy}}
    curve = [(4, accuracy - 0.03), (6, accuracy - 0.01), (10, accuracy)]
    return Run(method, seed, scores, steps=10, seconds=5.0, curve=curve)


PLATEAU = (
    "teacher: best validation accuracy {} at update 10 of 10; the last third of its updates "
    "brought 1.0 points."
)


def test_findings_compare_seed_by_seed_and_warn_of_a_weak_teacher():
    runs = [run("teacher", 1, 0.60), run("labels only", 1, 0.50), run("labels only", 2, 0.54)]
    runs += [run("kd", 1, 0.53, 0.49), run("kd", 2, 0.55), run("att_kl, then kd", 1, 0.70)]
    notes = findings(group(runs), "accuracy", 600)
    # kd gains 3 and 1 points: mean 2, sample standard deviation sqrt(2); on the validation split -1 and 1.
    assert notes.pop(0) == PLATEAU.format("0.600")
    gains = "kd: 2.0 ± 1.4 points of accuracy over labels only, better in 2 of 2 seeds; "
    assert notes[0] == gains + "on the validation split 0.0 ± 1.4."
    assert notes[1].startswith("att_kl, then kd: 20.0 points")
    assert notes[2].startswith("WARNING: att_kl, then kd (0.700) overtakes the teacher (0.600)")
    # sqrt(0.6 * 0.4 / 600)
    assert "600 test rows, which give an accuracy of 0.600 a standard error of 2.0" in notes[3]
    assert len(notes) == 4
    table = method_table(group(runs), "accuracy")
    assert table.rows[1] == ("labels only", "2", "0.520 ± 0.028", "0.520 ± 0.028", "10", "0:05")


def test_a_student_that_loses_is_reported_too():
    runs = [run("teacher", 1, 0.9), run("labels only", 1, 0.7), run("kd", 1, 0.6)]
    assert findings(group(runs), "accuracy", 600)[:-1] == [
        PLATEAU.format("0.900"),
        "kd: -10.0 points of accuracy over labels only, better in 0 of 1 seeds; on the validation split -10.0.",
    ]


def test_a_teacher_that_still_learns_is_warned_of():
    rising = dataclasses.replace(run("teacher", 1, 0.9), curve=[(3, 0.5), (6, 0.85), (9, 0.9)])
    note = findings(group([rising, run("labels only", 1, 0.7)]), "accuracy", 600)[0]
    assert note.startswith("WARNING: teacher: best validation accuracy 0.900 at update 9 of 10")
    assert "brought 5.0 points" in note
    assert note.endswith("raise teacher_steps.")


@pytest.fixture
def study(tmp_path):
    """Words of a study on a tiny task, but for the output folder."""
    model = save_tiny_model(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"task: {save_reviews(tmp_path / 'reviews')}\nlayers: [0, 3]\nmax_length: 16\n"
        "every_stage: {batch_size: 16, epochs: 1, lr: 3.0e-3, metric: accuracy}\n"
        "teacher: {name: teacher, objective: ce}\n"
        "stages:\n- {name: inner, objective: att_kl, metric: null}\n- {name: outer, objective: kd}\n"
    )
    words = ["study", "topic", "--model", model, "--recipe", str(recipe), "--seeds", "2"]
    return [*words, "--teacher_steps", "24", "--student_steps", "6"]


def test_study_runs_reports_and_keeps_finished_runs(study, tmp_path, capsys):
    out = tmp_path / "study"
    assert main([*study, "--output_dir", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    kinds = [(found["method"], found["seed"]) for found in results["runs"]]
    methods = ["labels only", "kd", "att_kl, then kd"]
    assert kinds == [("teacher", 1)] + [(method, seed) for seed in (1, 2) for method in methods]
    # Every student makes as many updates, in one stage or in two.
    assert [found["steps"] for found in results["runs"][1:]] == [6] * 6
    # All of them are evaluated to the end, the last update of a second stage included.
    assert [found["curve"][-1][0] for found in results["runs"]] == [24] + [6] * 6
    assert "over labels only" in capsys.readouterr().out
    assert (out / "bars.png").stat().st_size > 10_000
    assert not list(out.rglob("checkpoint-*"))

    # Again: nothing is trained, and one lost run is made anew with the very same outcome.
    lost = out / "kd-2" / "run.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/run.json")}
    assert main([*study, "--output_dir", str(out)]) == 0
    assert json.loads(lost.read_text())["scores"] == before["scores"]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_study_at_work_is_not_disturbed(study, tmp_path, capsys):
    out = tmp_path / "study"
    with other_run_in(out, "study topic"):
        assert main([*study, "--output_dir", str(out)]) == 1
        assert sorted(path.name for path in out.iterdir()) == [".bertkd-lock", "bertkd_run.json"]
    assert "study' is in use by another run (process " in capsys.readouterr().err


def test_students_of_another_teacher_are_made_anew(study, tmp_path, caplog):
    words = [*study, "--output_dir", str(tmp_path / "study"), "--seeds", "1"]
    words += ["--student_steps", "3", "--teacher_steps"]
    assert main([*words, "6"]) == 0
    runs = sorted((tmp_path / "study").glob("*/run.json"))
    assert len(runs) == 4
    before = [path.stat().st_mtime_ns for path in runs]
    caplog.clear()
    assert main([*words, "9"]) == 0
    assert all(path.stat().st_mtime_ns > time for path, time in zip(runs, before, strict=True))
    assert [record.getMessage().split(" ")[0] for record in caplog.records].count(
        str(tmp_path / "study" / "kd-1")
    ) == 1


def test_one_failed_student_is_reported_and_the_others_are_kept(
    study, tmp_path, monkeypatch, capsys
):
    def fails(module, stage, *args, **options):
        if stage.objective == "kd" and options["seed"] == 1:
            raise NonFiniteError("step 2: kd is nan")
        return train(module, stage, *args, **options)

    train = topic.train
    monkeypatch.setattr(topic, "train", fails)
    out = tmp_path / "study"
    words = [*study, "--output_dir", str(out), "--student_steps", "3", "--teacher_steps", "6"]
    assert main(words) == 1
    assert "2 of 6 students failed (kd, seed 1: step 2: kd is nan;" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    kinds = [(found["method"], found["seed"]) for found in results["runs"]]
    both = "att_kl, then kd"
    assert kinds == [
        ("teacher", 1), ("labels only", 1), ("labels only", 2), ("kd", 2), (both, 2)
    ]  # fmt: skip
    assert results["failed"][0] == "kd, seed 1: step 2: kd is nan"
    assert "FAILED: kd, seed 1: step 2: kd is nan" in (out / "report.md").read_text()
    # The next run makes what failed, and nothing else.
    monkeypatch.undo()
    assert main(words) == 0
    assert json.loads((out / "results.json").read_text())["failed"] == []


def test_a_teacher_counts_as_finished_once_it_is_saved(study, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    words = [*study, "--output_dir", str(tmp_path / "study"), "--seeds", "1"]
    words += ["--student_steps", "3", "--teacher_steps", "6"]
    monkeypatch.setattr(topic, "export", killed)
    assert main(words) == 130
    monkeypatch.undo()
    assert main(words) == 0
    # Nor does the record of this one answer for another one's weights.
    monkeypatch.setattr(topic, "write_json", killed)
    assert main([*words, "--teacher_steps", "9"]) == 130
    assert not (tmp_path / "study" / "teacher" / "run.json").exists()


def test_a_seed_without_a_label_only_student_is_not_compared():
    runs = [run("teacher", 1, 0.9), run("labels only", 2, 0.5), run("kd", 1, 0.6)]
    assert len(findings(group(runs), "accuracy", 600)) == 2
    notes = findings(group([*runs, run("kd", 2, 0.6)]), "accuracy", 600)
    assert notes[1].startswith("kd: 10.0 points of accuracy over labels only, better in 1 of 1")


def test_study_refuses_a_task_without_test_split_and_a_teacher_without_metric(
    study, tmp_path, capsys
):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    (tmp_path / "reviews" / "test.csv").unlink()
    assert main([*study, "--output_dir", str(out)]) == 1
    assert "has no labelled test split" in capsys.readouterr().err
    text = recipe.read_text()
    recipe.write_text(text.replace("objective: ce}", "objective: ce, metric: null}"))
    assert main([*study, "--output_dir", str(out)]) == 2
    assert "teacher stage has metric: null" in capsys.readouterr().err
    assert not out.exists()


def test_study_asks_for_what_draws_before_it_trains(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*study, "--output_dir", str(tmp_path / "out")]) == 1
    assert "import of matplotlib.figure halted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_study_refuses_what_cannot_work(study, tmp_path, capsys):
    words = [*study, "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--seeds", "0"]) == 2
    assert main([*words, "--recipe", "pydocs-retrieval"]) == 2
    assert "two stages" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shipped_recipe_gives_every_method_the_same_updates(tmp_path):
    from bertkd.study.topic import TopicStudy

    study = TopicStudy("model", Recipe.load("pydocs-topic"), tmp_path, student_steps=100)
    methods = study.methods()
    assert {name: sum(s.steps for s in stages) for name, stages in methods.items()} == {
        "labels only": 100,
        "kd": 100,
        "att_kl, then kd": 100,
    }
    last, plain = methods["kd"][-1], methods["labels only"][-1]
    assert dataclasses.replace(plain, objective=last.objective) == last


def test_students_are_what_the_recipe_says_and_made_anew_of_other_data(study, tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "hidden_size: 16\ncopy_head: true\n")
    made = []

    def spied(*given, **options):
        made.append(create_student(*given, **options))
        return made[-1]

    words = [*study, "--output_dir", str(tmp_path / "study"), "--seeds", "1"]
    words += ["--student_steps", "3", "--teacher_steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topic, "create_student", spied)
        assert main(words) == 0
    assert {student.config.hidden_size for student in made} == {16}
    # The same model by another name is the same; other texts of the same number and lengths are not.
    moved = shutil.copytree(tmp_path / "model", tmp_path / "moved")
    caplog.clear()
    assert main([*words, "--model", str(moved)]) == 0
    assert "made anew" not in caplog.text
    table = tmp_path / "reviews" / "test.csv"
    table.write_text(table.read_text().replace("film", "plot"))
    assert main(words) == 0
    assert caplog.text.count("made anew") == 4
