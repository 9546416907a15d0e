"""The benchmark at work, at tiny shapes: verification, memory, budget, folders, steps, comparison."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from bertkd.bench import __main__ as command
from bertkd.bench import (
    contestants,
    flex,
    memory,
    op_cases,
    peers,
    roofline,
    runner,
    step_runs,
)
from bertkd.bench.cases import Case, attention
from bertkd.bench.ops import SPECS
from bertkd.bench.record import read_rows
from bertkd.bench.roofline import Ceilings
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import Trainer, make_batches, step_case
from bertkd.bench.step_fill import largest_that
from bertkd.bench.verify import Oracle
from bertkd.ops.native import library as native
from bertkd.ops.verify import relative_error

CPU = torch.device("cpu")
SMALL = attention("relation_kl", (4, 3, 20, 8), "float32", padding="glue")
CASES = [
    SMALL,
    attention("relation_kl", (2, 3, 17, 8), "bfloat16"),
    attention("self_relation_kl", (3, 3, 20, 8), "float32", padding="glue"),
    attention("attention_mse", (3, 3, 20, 8), "float32", padding="glue"),
    Case("hidden_mse", width_s=8, width_t=8, rows=70, layers=2),
    Case("hidden_proj_mse", width_s=8, width_t=12, rows=70),
    Case("hidden_combine_mse", width_s=8, width_t=12, rows=70, layers=2),
    Case("hidden_cosine", width_s=8, width_t=8, rows=70),
    Case("softmax_kl", rows=70, classes=30),
    Case("linear_kl", width_s=8, width_t=12, rows=70, classes=30),
]


def settings(impls=("eager", "chunked"), **options):
    options = {"rounds": 3, "seconds": 1.0, "weigh": False, **options}
    return op_cases.Settings(CPU, options.pop("selection", Selection()), tuple(impls), **options)


def rows_of(case, impls=("eager", "chunked"), **options):
    return list(op_cases.run_case(case, settings(impls, **options)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_verified_and_timed(case):
    rows = rows_of(case, ceilings=lambda dtype: Ceilings(1e10, 1e11, 1e9))
    assert {row.status for row in rows} == {"ok"}, [row.note for row in rows]
    for mode in ("fwd", "fwd_bwd"):
        for impl in ("eager", "chunked"):
            found = {row.metric: row for row in rows if (row.mode, row.impl) == (mode, impl)}
            assert found["time"].p20 <= found["time"].p50 <= found["time"].p80
            assert found["time"].rounds == 3
            assert found["roofline"].p50 > 0
            assert ("speedup" in found) == (impl == "chunked")


def wrong_loss(change):
    """A contestant that computes relation_kl but for one change to its inputs or its loss."""

    def loss(inputs):
        return change(inputs, lambda x: SPECS["relation_kl"].call(x, "chunked"))

    return lambda op: loss


def scaled_gradient(inputs, call):
    value = call(inputs)
    return value + 0.5 * (value - value.detach())


def scaled_gradient_of_many(inputs, call):
    """Wrong only where there is more than the part."""
    return (scaled_gradient if inputs.student[0].shape[0] == 4 else lambda x, f: f(x))(inputs, call)


def last_sequence_dropped(inputs, call):
    cut = [[x[:-1] for x in side] for side in inputs[:2]]
    return call(inputs._replace(student=cut[0], teacher=cut[1], mask=inputs.mask[:-1]))


def middle_sequence_dropped(inputs, call):
    """Wrong only where no part looks."""
    kept = [0, 1, 3] if inputs.student[0].shape[0] == 4 else slice(None)
    cut = [[x[kept] for x in side] for side in inputs[:2]]
    return call(inputs._replace(student=cut[0], teacher=cut[1], mask=inputs.mask[kept]))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda inputs, call: call(inputs) * 1.001, "loss of a part"),
        (lambda inputs, call: call(inputs) * float("nan"), "loss of a part is off by nan"),
        (scaled_gradient, "gradient 1 of a part"),
        (scaled_gradient_of_many, "gradient 1 of the case"),
        (lambda inputs, call: call(inputs._replace(mask=None)), "loss of a part"),
        (last_sequence_dropped, "loss of a part"),
        (middle_sequence_dropped, "the case's loss is"),
    ],
)
def test_a_wrong_contestant_gets_no_figure(change, wrong, monkeypatch):
    monkeypatch.setitem(contestants.EXTRA, "wrong", wrong_loss(change))
    monkeypatch.setattr("bertkd.bench.verify.OURS", ("wrong",))
    rows = rows_of(SMALL, ("eager", "wrong"), selection=Selection({"mode": ("fwd_bwd",)}))
    (row,) = [row for row in rows if row.impl == "wrong"]
    assert row.status == "red"
    assert wrong in row.note
    assert row.p50 is None


def test_a_contestant_that_raises_does_not_stop_the_others(monkeypatch):
    def fails(inputs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(contestants.EXTRA, "broken", lambda op: fails)
    rows = rows_of(SMALL, ("eager", "broken", "chunked"))
    broken = [row for row in rows if row.impl == "broken"]
    assert {(row.status, row.note) for row in broken} == {("error", "RuntimeError: no such kernel")}
    assert any(row.impl == "chunked" and row.p50 for row in rows)


def test_peers_that_are_missing_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "textbrewer.losses", None)
    monkeypatch.delenv(peers.LINEARARD, raising=False)
    case = replace(SMALL, padding="full")
    assert "pip install --no-deps textbrewer" in peers.why_not("textbrewer", case, CPU, "fwd_bwd")
    assert peers.LINEARARD in peers.why_not("linearard", case, CPU, "fwd_bwd")
    monkeypatch.setenv(peers.LINEARARD, "/nowhere")
    assert "/nowhere has no kernels" in peers.why_not("linearard", case, CPU, "fwd_bwd")


def test_linearard_is_found_in_a_checkout_under_a_name_of_its_own(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "attention_KL"
    folder.mkdir(parents=True)
    (folder / "definition.py").write_text(
        "from bertkd.functional import relation_kl\n"
        "def align(qs, ks, qt, kt, attn_mask, causal, sm_scale_s, sm_scale_t):\n"
        "    assert not causal and qs.is_contiguous()\n"
        "    return relation_kl(qs, ks, qt, kt, attn_mask, reduction='sum', impl='eager')\n"
    )
    (folder / "integration.py").write_text("from .definition import align as attn_kl_align\n")
    monkeypatch.setenv(peers.LINEARARD, str(tmp_path))
    # A folder of that name on the path makes it a namespace for whoever asks, so it may be there already.
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert "CUDA" in peers.why_not("linearard", SMALL, CPU, "fwd_bwd")
    inputs = op_cases.make_inputs(SMALL, CPU)
    verdict = Oracle("relation_kl", inputs).judge(
        "linearard", peers.loss_of("linearard", "relation_kl"), "fwd_bwd"
    )
    assert verdict.wrong is None
    assert "kernels" not in sys.modules


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("case", [SMALL, CASES[2]], ids=lambda case: case.op)
def test_flex_attention_says_the_same(case, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    # Compiling takes half a minute; the formula is what is tested here.
    monkeypatch.setattr(flex, "_attention", lambda: flex_attention)
    inputs = op_cases.make_inputs(case, CPU)
    exact = SPECS[case.op].call(inputs.double(), "eager")
    with torch.no_grad():
        assert relative_error(flex.loss()(inputs), exact) < 1e-5
    assert "no backward" in flex.why_not(case, CPU, "fwd_bwd")
    assert "log-sum-exp" in flex.why_not(case, CPU, "fwd")


def touch(mebibytes):
    """For a child process: a run that holds so much at once, beside what was there before."""
    kept = bytearray(b"x") * (50 * 2**20)

    def run():
        block = bytearray(b"x") * (mebibytes * 2**20)
        return len(kept) + len(block)

    return run


def explode():
    raise ValueError("cannot be prepared")


def test_products_alone_are_those_of_contiguous_tensors():
    found = {}
    runs = {name: partial(found.__setitem__, name) for name in ("products", "eager")}
    inputs = op_cases.make_inputs(SMALL, CPU)
    op_cases.times_of(SMALL, inputs, runs, settings(rounds=3))
    assert found["eager"] is inputs
    assert not any(x.is_contiguous() for x in [*inputs.student, *inputs.teacher])
    plain = found["products"]  # torch.matmul would copy the others, which is no part of a product
    assert all(x.is_contiguous() for x in [*plain.student, *plain.teacher])
    assert all(map(torch.equal, plain.student + plain.teacher, inputs.student + inputs.teacher))


def test_compilers_take_no_time_from_the_less_important():
    for impl in ("compile", "flex"):
        asked = partial(contestants.why_not, impl, device=torch.device("cuda"))
        assert asked(SMALL, mode="fwd_bwd") is None
        assert asked(SMALL, mode="fwd") == "compiled with gradients only"
        less = asked(replace(SMALL, importance=2), mode="fwd_bwd")
        assert less == "compiled for the most important cases only"
    assert contestants.why_not("compile", SMALL, CPU, "fwd") is None


def test_flex_attention_stays_compiled_however_many_cases_there_are(monkeypatch):
    compiler = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(flex, "_attention", flex._attention.__wrapped__)
    monkeypatch.setattr(flex, "why_not", lambda *_: None)
    limit = torch._dynamo.config.patch  # not monkeypatch, which takes such an option away for good
    settings = op_cases.Settings(CPU, Selection({"mode": ("fwd",)}), ("eager", "flex"), rounds=3)
    found = []
    # The graphs of one case: of both networks, of the part that is verified and of the whole.
    with limit(recompile_limit=4):
        for length in (40, 56):
            case = attention("relation_kl", (2, 3, length, 16), "float32")
            found += [row.status for row in op_cases.run_case(case, settings) if row.impl == "flex"]
    assert found == ["ok"] * 4
    # More than PyTorch keeps is an error, not a time of code that makes maps after all.
    with limit(recompile_limit=2):
        time, *_ = (row for row in op_cases.run_case(case, settings) if row.impl == "flex")
    assert (time.status, time.p50) == ("error", None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_a_child_counts_the_run_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(runner.Path(__file__).parent))
    assert memory.peak_in_child(touch, 64) / 2**20 == pytest.approx(64, abs=6)
    with pytest.raises(RuntimeError, match="ValueError: cannot be prepared"):
        memory.peak_in_child(explode)
    eager, chunked = (
        memory.peak_in_child(
            op_cases.prepared, attention("relation_kl", (2, 4, 512, 16), "float32"), impl
        )
        for impl in ("eager", "chunked")
    )
    assert eager > 3 * 2 * 4 * 512**2 * 4
    assert chunked < eager / 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(native.unavailable() is not None, reason="needs the native kernels")
def test_scratch_that_native_code_keeps_belongs_to_the_run():
    case = attention("relation_kl", (1, 1, 2048, 8), "float32")
    gradients = 2 * 2048 * 8 * 4
    assert memory.peak_in_child(op_cases.prepared, case, "native") > 5 * gradients


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(roofline, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11, 1e9))
    cases = [SMALL, replace(CASES[3], importance=2), step_case("tiny", 2, 12, importance=3)]
    monkeypatch.setattr(runner, "all_cases", lambda device: cases)
    return cases


def test_a_run_fills_a_folder_and_a_second_one_replaces_its_cases(small_cases, tmp_path):
    folder = tmp_path / "results"
    said = []
    options = runner.Options(
        "impl=eager|chunked", "cpu", str(folder), rounds=3, seconds=0.5, memory=False
    )
    runner.run(runner.plan(options), said.append)
    assert {p.name for p in folder.iterdir()} >= {
        "results.csv",
        "environment.json",
        "summary.md",
        "roofline.png",
        "steps.png",
    }
    rows = read_rows(folder / "results.csv")
    assert {row.op for row in rows if row.kind != "ceiling"} == {case.op for case in small_cases}
    assert {row.unit for row in rows if row.kind == "ceiling"} == {"bytes/s", "flops/s", "exps/s"}
    assert all(row.threads == torch.get_num_threads() and row.torch and row.date for row in rows)
    assert said[-1].splitlines()[0].startswith("case")
    assert json.loads((folder / "environment.json").read_text())["left_out"] == []
    again = replace(options, select="attention_mse,impl=chunked", plots=False)
    runner.run(runner.plan(again), said.append)
    assert len(read_rows(folder / "results.csv")) == len(rows)


def test_a_budget_keeps_the_most_important_and_names_the_rest(small_cases, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(runner, "measured", lambda case, settings: iter(()))
    said = []
    options = runner.Options(None, "cpu", str(tmp_path / "r"), budget_minutes=1.0, plots=False)
    runner.run(runner.plan(options), said.append)
    # The clock reads 0.7 minutes before the first case and 1.3 before the second.
    assert [case.name in "".join(said) for case in small_cases] == [True, True, True]
    left_out = json.loads((tmp_path / "r" / "environment.json").read_text())["left_out"]
    assert left_out == [case.name for case in small_cases[1:]]
    assert any(text.startswith("left out for want of time (2)") for text in said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--select", "relatoin_kl"], "Did you mean 'relation_kl'"),
        (["--device", "cuda"], "no CUDA device"),
        (["--rounds", "2"], "rounds must be at least 3"),
        (["--budget_minutes", "-1"], "budget_minutes must be positive"),
        (["--select", "relation_kl,L=2048,D=64"], "leaves no case"),
        (["report", "/nowhere"], "/nowhere"),
        (["compare", "--base", "no-such-commit"], "no-such-commit"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(words, message, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main(words) == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 1


def test_list_names_cases_and_reasons(capsys):
    assert command.main(["--list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "relation_kl[B8 H12 L128 Ds64 Dt64 float32]" in text
    assert "triton" in text


def test_steps_agree_with_eager_and_are_timed():
    for case in (step_case("tiny", 2, 12, padding="glue"), step_case("tiny_qkv", 2, 12)):
        rows = list(step_runs.run_step(case, settings(selection=Selection({"impl": ("chunked",)}))))
        found = {row.metric: row for row in rows}
        assert {row.status for row in rows} == {"ok"}, rows
        assert found["throughput"].p50 > 0
        assert found["speedup"].against == "eager"
        assert {row.impl for row in rows} == {"chunked"}


def test_a_step_that_differs_from_eager_gets_no_figure(monkeypatch):
    loss = Trainer.loss
    monkeypatch.setattr(
        Trainer,
        "loss",
        lambda self, batch: loss(self, batch) * (1 if self.impl == "eager" else 1.1),
    )
    rows = list(step_runs.run_step(step_case("tiny", 2, 12), settings()))
    (row,) = [row for row in rows if row.impl == "chunked"]
    assert row.status == "red"
    assert "loss is off eager's" in row.note


def test_batches_of_glue_lengths_are_padded_to_their_own_longest():
    batches = make_batches(step_case("tiny", 16, 128, padding="glue"), CPU)
    masks = [batch["attention_mask"] for batch in batches]
    assert len({mask.shape[1] for mask in masks}) > 1
    for mask in masks:
        assert mask.sum(1).max() == mask.shape[1]
        assert mask.sum(1).min() >= 8


def test_largest_that_fits():
    for limit in (1, 7, 64, 100, 1000):
        found = largest_that(lambda batch, limit=limit: batch <= limit, 32)
        assert limit * 7 // 8 <= found <= limit
    assert largest_that(lambda batch: False, 32) == 0
    for start in (3, 64, 100):
        asked = []
        assert largest_that(lambda batch, asked=asked: not asked.append(batch), start, 64) > 56
        assert max(asked) <= 64


def test_the_bench_needs_torch_alone(tmp_path):
    """On a GPU machine transformers, matplotlib and jsonargparse may be missing."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'matplotlib', 'jsonargparse', 'datasets', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "from bertkd.bench import runner, ops_attention\n"
        "from bertkd.bench.cases import attention\n"
        "from bertkd.bench.step_cases import step_case\n"
        "cases = [attention('relation_kl', (1, 2, 9, 4), 'float32'), step_case('tiny', 2, 12)]\n"
        "runner.all_cases = lambda device: cases\n"
        f"options = runner.Options('impl=chunked', 'cpu', {str(tmp_path / 'r')!r}, 3, 0.2, memory=False)\n"
        "rows = runner.run(runner.plan(options))\n"
        "assert {r.status for r in rows if r.kind == 'op'} == {'ok'}, rows\n"
        "assert {r.status for r in rows if r.kind == 'step'} == {'unavailable'}, rows\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no plots" in done.stdout
