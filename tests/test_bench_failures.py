"""What a benchmark does when a case, a contestant or the whole GPU fails, or its user interrupts it."""

from dataclasses import replace

import pytest
import torch

from bertkd.bench import __main__ as command
from bertkd.bench import (
    contestants,
    op_cases,
    roofline,
    runner,
    step_runs,
    timing,
)
from bertkd.bench.cases import attention
from bertkd.bench.record import Row, read_rows
from bertkd.bench.roofline import Ceilings
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import step_case
from bertkd.bench.timing import DeviceLost

CPU = torch.device("cpu")
SMALL = attention("relation_kl", (2, 2, 9, 4), "float32")
CASES = [SMALL, replace(SMALL, batch=3), replace(SMALL, batch=4)]


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Three small cases in the test's own process, as on a GPU."""
    monkeypatch.setattr(roofline, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11, 1e9))
    monkeypatch.setattr(runner, "all_cases", lambda device: CASES)
    monkeypatch.setattr(runner, "measured_apart", runner.measured)
    words = {"device": "cpu", "output_dir": tmp_path / "r", "select": "impl=eager|chunked"}
    words |= {"memory": "false", "plots": "false", "rounds": 3, "seconds": 0.1}
    return [f"--{name}={value}" for name, value in words.items()]


def fail_at(monkeypatch, batch, error):
    """Let the case of this batch raise."""
    real = runner.run_case

    def run_case(case, settings):
        if case.batch == batch:
            raise error
        return real(case, settings)

    monkeypatch.setattr(runner, "run_case", run_case)


def test_a_case_that_fails_is_told_and_the_others_are_kept(options, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 3, RuntimeError("no kernel image"))
    assert command.main(options) == 1
    assert "*: RuntimeError: no kernel image" in capsys.readouterr().err
    rows = read_rows(tmp_path / "r" / "results.csv")
    assert {row.batch for row in rows if row.metric == "speedup"} == {2, 4}
    assert "no kernel image" in (tmp_path / "r" / "summary.md").read_text()


def test_a_lost_gpu_ends_the_run_and_blames_no_later_case(options, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 3, RuntimeError("an illegal memory access"))

    def lost(device):
        raise DeviceLost("the GPU is lost to this process: an illegal memory access")

    monkeypatch.setattr(runner, "check_device", lost)
    assert command.main(options) == 1
    text = capsys.readouterr().out
    assert (
        f"left out for the GPU is lost to this process: an illegal memory access (1): {CASES[2].name}"
        in text
    )
    rows = read_rows(tmp_path / "r" / "results.csv")
    assert {row.batch for row in rows if row.metric == "speedup"} == {2}
    assert {row.batch for row in rows} - {0} == {2, 3}
    assert "left out for the GPU is lost" in (tmp_path / "r" / "summary.md").read_text()


def test_a_contestant_that_loses_the_gpu_costs_nobody_after_it(monkeypatch):
    def fails(inputs):
        raise RuntimeError("an illegal memory access")

    def lost(device):
        raise DeviceLost("gone")

    monkeypatch.setitem(contestants.EXTRA, "broken", lambda op: fails)
    monkeypatch.setattr(op_cases, "check_device", lost)
    impls = ("eager", "broken", "chunked")
    settings = op_cases.Settings(CPU, Selection(), impls, 3, 0.1, weigh=False)
    rows = list(runner.measured(SMALL, settings))
    assert [(row.impl, row.status) for row in rows] == [("broken", "error"), ("*", "error")]


def test_the_device_is_asked_whether_it_is_lost(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access\nand advice")

    timing.check_device(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    timing.check_device(CPU)
    with pytest.raises(DeviceLost, match=r"this process: CUDA error: an illegal memory access$"):
        timing.check_device(torch.device("cuda"))


def test_an_interrupted_run_keeps_its_cases(options, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 4, KeyboardInterrupt())
    assert command.main(options) == 130
    captured = capsys.readouterr()
    assert "interrupted; the 2 cases before this one are kept" in captured.out
    assert captured.err == "bertkd bench: interrupted\n"
    rows = read_rows(tmp_path / "r" / "results.csv")
    assert {row.batch for row in rows if row.metric == "speedup"} == {2, 3}


def test_a_folder_is_checked_before_anything_runs(options, tmp_path, capsys):
    (tmp_path / "r").write_text("mine")
    assert command.main(options) == 2
    captured = capsys.readouterr()
    assert "is a file; name a directory" in captured.err
    assert captured.out == ""


def test_a_disk_that_is_full_is_no_wrong_usage(options, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(runner, "write_rows", full)
    assert command.main(options) == 1
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "selection", "expected"),
    [
        (
            {"eager": [9.0], "chunked": [3.0], "native": [1.0], "triton": [2.0]},
            {},
            ["eager", "native"],
        ),
        ({"eager": [9.0], "chunked": [1.0], "native": [3.0]}, {}, ["eager", "chunked"]),
        ({"eager": [9.0], "native": [3.0]}, {"impl": ("native",)}, ["native"]),
        ({"chunked": [3.0]}, {}, ["eager", "chunked"]),
    ],
)
def test_the_largest_batch_is_that_of_the_fastest(times, selection, expected, monkeypatch):
    class Pretended:
        batches = ({},)
        tokens = 8

    monkeypatch.setattr(step_runs, "interleaved", lambda *a, **k: times)
    asked = []
    monkeypatch.setattr(step_runs, "_fill", lambda case, names, *_: asked.extend(names) or ())
    settings = op_cases.Settings(
        torch.device("cuda"), Selection(selection), tuple(times), weigh=False
    )
    trainers = {impl: Pretended() for impl in times}
    row = step_runs.partial(Row, "step", "tiny", mode="step")
    list(step_runs._measure(step_case("tiny", 2, 12), trainers, {}, row, settings))
    assert asked == expected


def test_a_largest_batch_that_fails_is_a_row_and_the_next_is_tried(monkeypatch):
    def resize(self, batch):
        if batch > 4 and self.impl == "eager":
            raise RuntimeError("index out of 32 bits")
        if batch > 6:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(step_runs.Trainer, "resize", resize)
    monkeypatch.setattr(step_runs.Trainer, "__call__", lambda self: None)
    settings = op_cases.Settings(CPU, Selection(), ("eager", "chunked"))
    row = step_runs.partial(Row, "step", "tiny", mode="step")
    eager, chunked = step_runs._fill(step_case("tiny", 2, 12), ["eager", "chunked"], row, settings)
    assert (eager.status, eager.note) == ("error", "RuntimeError: index out of 32 bits")
    assert chunked.p50 == 6


def test_a_step_that_an_implementation_refuses_is_no_failure(monkeypatch):
    def refuses(self):
        if self.impl != "eager":
            raise ValueError("impl='chunked' cannot run relation_kl: too long. Use impl='auto'.")

    monkeypatch.setattr(step_runs.Trainer, "__call__", refuses)
    settings = op_cases.Settings(CPU, Selection({"impl": ("chunked",)}), (), 3, 0.1, weigh=False)
    (row,) = step_runs.run_step(step_case("tiny", 2, 12), settings)
    assert row.status == "unavailable"
    assert row.note.startswith("impl='chunked' cannot run relation_kl: too long")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "-1"], "seconds must be positive and finite, got -1.0"),
        (["--seconds", "0"], "seconds must be positive"),
        (["--seconds", "nan"], "seconds must be positive"),
        (["--budget_minutes", "inf"], "budget_minutes must be positive and finite"),
        (["--device", "cpux"], "device must be 'cpu', 'cuda' or 'cuda:N', got 'cpux'"),
        (["--device", "mps"], "got 'mps'"),
        (["--device", "cpu:3"], "got 'cpu:3'"),
        (["--device", ""], "got ''"),
        (["--device", "cuda:99"], "device='cuda:99': "),
        (["--output_dir", ""], "output_dir is empty"),
        (["report", "no-such-folder"], "holds no results.csv"),
        (["compare", "--base", "HEAD", "--device", "cpux"], "got 'cpux'"),
        (["compare", "--base", "HEAD", "--pairs", "0"], "pairs must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(words, message, capsys):
    assert command.main(words) == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "words", [["readme", "--chek"], ["readme", "more"], ["report"], ["--seconds", "x"], ["words"]]
)
def test_words_that_nobody_knows_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(command.readme, "write_text", lambda *_: pytest.fail("it was written"))
    with pytest.raises(SystemExit) as exit_:
        command.main(words)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Timed rounds of a case; fewer where they take longer" in text
    assert "Draw the pictures too; needs matplotlib." in text
    parser = command.plain_parser(command.Options)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_a_damaged_line_of_results_is_named(tmp_path):
    path = runner.write_rows(tmp_path / "results.csv", [Row("op", "relation_kl", "eager", 8)])
    path.write_text(path.read_text().replace(",8,", ",eight,"))
    with pytest.raises(ValueError, match=r"results\.csv, line 2: .*'eight'"):
        read_rows(path)
