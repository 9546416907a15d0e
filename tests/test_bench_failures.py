"""What a benchmark does when a case, a contestant or the whole GPU fails, or its user interrupts it."""

import json
from dataclasses import replace

import pytest
import torch

from bertkd.bench import __main__ as command
from bertkd.bench import (
    contestants,
    op_cases,
    roofline,
    runner,
    step_fill,
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


def test_a_folder_is_of_one_device(options, monkeypatch, tmp_path, capsys):
    assert command.main(options) == 0
    before = (tmp_path / "r" / "results.csv").read_bytes()
    monkeypatch.setattr(runner.environment, "device_name", lambda device: "Another CPU, 2 cores")
    monkeypatch.setattr(runner, "measured", lambda *_: pytest.fail("a case was run"))
    assert command.main(options) == 1
    assert "and this is Another CPU, 2 cores; name another folder" in capsys.readouterr().err
    assert (tmp_path / "r" / "results.csv").read_bytes() == before


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
            {"eager": 9.0, "chunked": 3.0, "native": 1.0, "triton": 2.0},
            {},
            ["eager", "native"],
        ),
        ({"eager": 9.0, "chunked": 1.0, "native": 3.0}, {}, ["eager", "chunked"]),
        ({"native": 3.0}, {"impl": ("native",)}, ["native"]),
        ({"eager": None, "chunked": 3.0}, {}, ["eager", "chunked"]),
        ({}, {}, ["eager"]),
    ],
)
def test_the_largest_batch_is_that_of_the_fastest(times, selection, expected):
    case = step_case("tiny", 2, 12)
    rows = [Row(**case.columns, impl=impl, metric="time", p50=time) for impl, time in times.items()]
    others = [replace(row, length=99, p50=0.1) for row in rows]
    others += [replace(row, metric="memory", p50=0.1) for row in rows]
    settings = op_cases.Settings(CPU, Selection(selection), ())
    assert step_fill.contestants(case, [*rows, *others], settings) == expected


def test_a_largest_batch_that_fails_is_a_row_and_the_next_is_tried(monkeypatch):
    def resize(self, batch):
        if batch > 4 and self.impl == "eager":
            raise RuntimeError("index out of 32 bits")
        if batch > 6:
            # As a kernel's launch says it where the allocator has taken all.
            raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(step_fill.Trainer, "resize", resize)
    monkeypatch.setattr(step_fill.Trainer, "__call__", lambda self: None)
    asked = []
    monkeypatch.setattr(step_fill, "check_device", asked.append)
    settings = op_cases.Settings(CPU, Selection(), ("eager", "chunked"))
    eager, chunked = step_fill.fill(step_case("tiny", 2, 12), ["eager", "chunked"], settings)
    assert asked == [CPU]
    assert (eager.status, eager.note) == ("error", "RuntimeError: index out of 32 bits")
    assert chunked.p50 == 6


def test_largest_batches_are_searched_for_last_and_left_out_by_name(tmp_path, monkeypatch):
    steps = [step_case("tiny", 2, 12), step_case("tiny", 2, 16, importance=2), SMALL]
    monkeypatch.setattr(runner, "all_cases", lambda device: steps)
    monkeypatch.setattr(step_fill, "is_filled", lambda case, device: case is steps[0])
    done = []
    monkeypatch.setattr(runner, "measured", lambda case, settings: done.append(case) or [])
    monkeypatch.setattr(step_fill, "fill", lambda case, impls, settings: done.append(impls) or [])
    options = runner.Options(None, "cpu", str(tmp_path / "r"), plots=False)
    runner.run(runner.plan(options), lambda text: None)
    assert done == [*steps, ["eager"]]

    def lost(*_):
        raise DeviceLost("gone")

    monkeypatch.setattr(step_fill, "fill", lost)
    rows = runner.run(runner.plan(options), lambda text: None)
    assert [(row.impl, row.note) for row in rows] == [("*", "DeviceLost: gone")]
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(clock)))
    runner.run(runner.plan(replace(options, budget_minutes=1.0)), lambda text: None)
    names = json.loads((tmp_path / "r" / "environment.json").read_text())["left_out"]
    assert names == [steps[1].name, SMALL.name, f"largest batch of {steps[0].name}"]


def test_a_step_out_of_memory_in_a_round_costs_the_others_nothing(monkeypatch):
    calls = []
    step = step_runs.Trainer.__call__

    def run(self):
        calls.append(self.impl)
        if self.impl == "chunked" and calls.count("chunked") == 3:
            raise torch.OutOfMemoryError("full")
        step(self)

    monkeypatch.setattr(step_runs.Trainer, "__call__", run)
    settings = op_cases.Settings(
        CPU, Selection({"impl": ("eager", "chunked")}), (), 3, 0.1, weigh=False
    )
    rows = list(step_runs.run_step(step_case("tiny", 2, 12), settings))
    found = {(row.impl, row.metric, row.status) for row in rows}
    assert found >= {("chunked", "time", "oom"), ("eager", "time", "ok")}
    assert ("chunked", "time", "ok") not in found


def test_a_gpu_lost_in_the_rounds_is_the_fault_of_one(monkeypatch):
    """Everybody after it fails too, and keeps what was measured of it before."""
    calls, gone = [], []

    def run(self):
        calls.append(self.impl)
        if gone or (self.impl == "chunked" and calls.count("chunked") == 3):
            gone.append(self.impl)
            raise RuntimeError("CUDA error: an illegal memory access")

    def lost(device):
        if gone:
            raise DeviceLost("gone")

    monkeypatch.setattr(step_runs.Trainer, "__call__", run)
    monkeypatch.setattr(timing, "check_device", lost)
    impls = ("eager", "chunked", "native")
    settings = op_cases.Settings(CPU, Selection({"impl": impls}), (), 3, 0.1, weigh=False)
    rows = list(runner.measured(step_case("tiny", 2, 12), settings))
    assert [(row.impl, row.status) for row in rows] == [("chunked", "error"), ("*", "error")]

    def replayed(makers, **options):
        options["on_failure"]("chunked", RuntimeError("CUDA error: an illegal memory access"))

    monkeypatch.setattr(op_cases, "interleaved", replayed)
    settings = op_cases.Settings(CPU, Selection(), ("eager", "chunked"), 3, 0.1, weigh=False)
    rows = list(runner.measured(SMALL, settings))
    assert [(row.impl, row.status) for row in rows] == [("chunked", "error"), ("*", "error")]


def test_largest_batches_are_searched_for_where_steps_are_wanted(monkeypatch):
    monkeypatch.setattr(step_fill, "is_filled", lambda case, device: True)
    case = step_case("tiny", 2, 12)
    for mode, count in (("step", 2), ("fwd", 1)):
        settings = op_cases.Settings(CPU, Selection({"mode": (mode,)}), ())
        assert len(runner._tasks([case], settings, [], runner.measured)) == count


def test_largest_batches_are_those_of_the_most_important_steps_on_a_gpu():
    gpu, case = torch.device("cuda"), step_case("tiny", 2, 12)
    assert step_fill.is_filled(case, gpu)
    assert not step_fill.is_filled(case, CPU)
    for other in ({"importance": 2}, {"padding": "glue"}, {"processes": 2}):
        assert not step_fill.is_filled(replace(case, **other), gpu)
    assert not step_fill.is_filled(SMALL, gpu)


@pytest.mark.parametrize(
    ("impl", "status", "fails"),
    [
        ("native", "red", True),
        ("native", "error", True),
        ("*", "error", True),
        ("native", "oom", False),
        ("native", "unavailable", False),
        # What a rival cannot do is no fault of this package.
        ("textbrewer", "error", False),
        ("eager", "red", False),
    ],
)
def test_whose_failures_fail_a_run(impl, status, fails, monkeypatch):
    row = Row("op", "relation_kl", impl, status=status, note="what it said")
    monkeypatch.setattr(runner, "run", lambda *_, **__: [row])
    if fails:
        with pytest.raises(ValueError, match=r"1 measurements failed.*what it said"):
            runner.run_apart(None)
    else:
        runner.run_apart(None)


def test_results_lie_with_the_committed_ones_in_a_checkout_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runner.output_folder("here", CPU) == runner.Path("here")
    assert runner.output_folder(None, CPU).parts[:-1] == ("bench",)
    for folder in ("bertkd/bench", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    assert runner.output_folder(None, CPU).parts[:-1] == ("benchmarks", "results")


def test_a_sweep_that_was_left_out_is_not_measured_by_its_like(tmp_path):
    case = step_case("tiny", 2, 12)
    names = [runner._task_name(replace(case, kind=kind)) for kind in ("step", "scaling")]
    (tmp_path / "environment.json").write_text(json.dumps({"left_out": names}))
    row = Row(**case.columns, impl="eager", metric="time", p50=1.0)
    assert runner._left_out_before(tmp_path, [], [row]) == names[1:]


def test_what_was_left_out_is_remembered_until_it_is_measured(options, tmp_path, monkeypatch):
    def left_out():
        facts = json.loads((tmp_path / "r" / "environment.json").read_text())
        return facts["left_out"], facts["left_out_because"]

    real = runner.measured
    fail_at(monkeypatch, 4, KeyboardInterrupt())
    assert command.main(options) == 130
    assert left_out() == ([CASES[2].name], "the run was cut off")
    words = [word for word in options if not word.startswith("--select")]
    assert command.main([*words, "--select", "impl=eager|chunked,B=2"]) == 0
    assert left_out()[0] == [CASES[2].name]
    monkeypatch.setattr(runner, "run_case", op_cases.run_case)
    assert runner.measured is real
    assert command.main([*words, "--select", "impl=eager|chunked,B=4"]) == 0
    assert left_out()[0] == []


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
