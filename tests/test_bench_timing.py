"""How the benchmark takes time: turns, replays, what is told of an error, and the bounds that times are held to."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bertkd.bench import ops_attention, roofline, runner, timing
from bertkd.bench.cases import Case, attention
from bertkd.bench.ops import SPECS
from bertkd.bench.roofline import Ceilings, bound
from bertkd.bench.spec import Work
from bertkd.bench.timing import Failures, input_sets, interleaved, replayed, told

CPU = torch.device("cpu")


def test_interleaving_gives_all_the_same_rounds_and_keeps_to_its_time():
    calls = []
    times = interleaved({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=4, warmup=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert ["".join(calls[i : i + 3]) for i in range(0, 15, 3)] == [
        "abc",
        "bca",
        "cab",
        "abc",
        "bca",
    ]
    assert len(interleaved({"a": lambda: None}, rounds=99, seconds=0.0)["a"]) == 3


def test_replays_visit_everybody_twice_and_live_one_at_a_time():
    order, alive = [], []

    class Replay:
        note = "cuda graph"

        def __init__(self, name):
            assert not alive
            alive.append(name)
            self.name = name

        def __del__(self):
            alive.remove(self.name)

        def __call__(self):
            if self.name == "big":
                raise torch.OutOfMemoryError("too big")
            order.append(self.name)
            return {"a": 1.0, "b": 2.0}[self.name]

    makers = {name: (lambda name=name: Replay(name)) for name in ("a", "big", "b")}
    told_of = []
    times, _ = replayed(
        makers, rounds=6, seconds=9.0, on_failure=lambda *failure: told_of.append(failure)
    )
    assert times == {"a": [1.0] * 6, "b": [2.0] * 6}
    assert [name for name, _ in told_of] == ["big"]
    assert not alive
    # Two replays to warm up and three that count, forwards and then backwards.
    assert "".join(order) == "a" * 5 + "b" * 10 + "a" * 5


def test_who_fails_in_a_second_visit_has_no_times_and_others_keep_theirs():
    visits = []

    class Replay:
        note = "cuda graph"

        def __init__(self, name):
            visits.append(name)
            if name == "b" and visits.count("b") == 2:
                raise RuntimeError("Triton Error [CUDA]: out of memory")

        def __call__(self):
            return 1.0

    failures = Failures(CPU)
    makers = {n: (lambda n=n: Replay(n)) for n in "ab"}
    times, _ = replayed(makers, rounds=6, seconds=9.0, on_failure=failures)
    assert times == {"a": [1.0] * 6}
    assert failures.found == {"b": {"status": "oom", "note": "out of memory"}}
    visits.clear()
    with pytest.raises(RuntimeError, match="Triton Error"):
        replayed(makers, rounds=6, seconds=9.0)


def test_who_fails_in_a_round_is_told_and_the_others_go_on():
    calls, told_of = [], []

    def second(name):
        calls.append(name)
        if name == "b" and calls.count("b") == 3:
            raise torch.OutOfMemoryError("full")

    runs = {n: lambda n=n: second(n) for n in "abc"}
    times = interleaved(
        runs, rounds=4, warmup=1, on_failure=lambda name, error: told_of.append((name, str(error)))
    )
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "c": 4}
    assert told_of == [("b", "full")]
    assert calls.count("b") == 3
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0})


def test_where_nobody_is_left_no_round_is_timed():
    def fails():
        raise RuntimeError("no such kernel")

    names = []
    runs = {"a": fails, "b": fails}
    assert interleaved(runs, rounds=4, on_failure=lambda name, _: names.append(name)) == {}
    assert names == ["a", "b"]


def test_a_round_is_over_when_the_device_is(monkeypatch):
    now, pending = [0.0], [7.0]  # some work is under way before the first round

    def launch(seconds):
        pending[0] += seconds

    def wait():
        now[0] += pending[0]
        pending[0] = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    runs = {"a": lambda: launch(1.0), "b": lambda: launch(2.0)}
    times = interleaved(runs, rounds=3, warmup=0, synchronise=wait)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize(("seconds", "rounds"), [(24.0, 6), (0.0, 3)])
def test_visits_share_the_time_but_all_make_three_rounds(seconds, rounds, monkeypatch):
    now = [0.0]

    class Replay:
        note = "cuda graph"

        def __call__(self):
            now[0] += 1.0
            return 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    times, _ = replayed({"a": Replay, "b": Replay}, rounds=99, seconds=seconds)
    assert {name: len(values) for name, values in times.items()} == {
        "a": 2 * rounds,
        "b": 2 * rounds,
    }


def test_a_device_is_not_suspected_where_memory_ran_out(monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "check_device", asked.append)
    failures = Failures(CPU)
    failures("a", torch.OutOfMemoryError("full"))
    assert asked == []
    failures("b", RuntimeError("an illegal memory access"))
    assert asked == [CPU]
    assert {name: found["status"] for name, found in failures.found.items()} == {
        "a": "oom",
        "b": "error",
    }


def test_errors_are_told_in_a_line():
    assert len(told(ValueError("x" * 1000))["note"]) < 200
    assert told(ValueError("wrong\nand why")) == {"status": "error", "note": "ValueError: wrong"}
    assert told(KeyError())["note"] == "KeyError: "
    words = RuntimeError("CUDA error: Out of memory"), RuntimeError("can't allocate memory: you")
    for error in (torch.OutOfMemoryError("x"), MemoryError(), *words):
        assert told(error) == {"status": "oom", "note": "out of memory"}


def test_inputs_rotate_through_more_than_the_cache():
    assert input_sets(10 * 2**20, 50 * 2**20) * 10 > 100
    assert input_sets(3 * 2**20, 50 * 2**20) * 3 > 100
    assert (input_sets(2**40, 2**20), input_sets(1, 2**30)) == (2, 64)


def test_bound_is_the_slowest_resource():
    work = SPECS["relation_kl"].work(attention("relation_kl", (1, 1, 100, 10), "float32"), True)
    # Six tensors of 100 x 10 floats; two scores and two gradients of 2 L^2 D; two exponentials a pair.
    assert work == (6 * 1000 * 4, 4 * 2 * 100 * 100 * 10, 2 * 100 * 100)
    assert bound(work, Ceilings(1e3, 1e9, 1e9)) == (24.0, "bytes")
    assert bound(work, Ceilings(1e9, 1e9, 1e3)) == (20.0, "exps")


ROWS = {"rows": 5, "width_s": 2, "width_t": 3}
# Bytes (of float32), flops and exponentials by hand, first without gradients and then with them. B 1, H 1, L 5, D 2: 25
# pairs, 10 numbers a tensor. Scores of a tensor with itself are symmetric.
WORK = [
    (attention("self_relation_kl", (1, 1, 5, 2), "float32"), (80, 100, 25), (120, 200, 25)),
    # Two scores, or two symmetric Gram matrices of 4 x 4; two gradients of 2 columns, by the one or the other.
    (attention("attention_mse", (1, 1, 5, 2), "float32"), (160, 160, 0), (240, 320, 0)),
    (attention("attention_mse", (1, 1, 2, 2), "float32"), (64, 32, 0), (96, 64, 0)),
    (attention("self_attention", (1, 1, 5, 2), "float32"), (160, 200, 25), (320, 600, 25)),
    (Case("hidden_mse", **ROWS | {"width_s": 3, "layers": 2}), (240, 90, 0), (360, 90, 0)),
    (Case("hidden_proj_mse", **ROWS), (124, 60, 0), (188, 180, 0)),
    # Both matrices, of 4 and 6 wide sides, are read, and the second written.
    (Case("hidden_combine_mse", **ROWS, layers=2), (296, 240, 0), (472, 480, 0)),
    (Case("hidden_cosine", **ROWS | {"width_s": 3}), (120, 45, 0), (180, 45, 0)),
    (Case("softmax_kl", rows=5, classes=7), (280, 210, 70), (420, 210, 70)),
    # Of four products of 5 x 7 logits the teacher's is 3 wide, the student's and its gradients' 2.
    (Case("linear_kl", **ROWS, classes=7), (240, 350, 70), (336, 630, 70)),
]


@pytest.mark.parametrize(("case", "value", "gradient"), WORK, ids=lambda x: getattr(x, "name", ""))
def test_least_work_is_what_one_counts_by_hand(case, value, gradient):
    work = SPECS[case.op].work
    assert (work(case, False), work(case, True)) == (value, gradient)


def test_pads_are_no_work(monkeypatch):
    monkeypatch.setattr(ops_attention, "glue_lengths", lambda batch, length: [4, 1])
    case = attention("relation_kl", (2, 3, 5, 2), "float16", padding="glue")
    # 3 heads of 5 tokens and 17 pairs.
    assert SPECS["relation_kl"].work(case, False) == (2 * 4 * 15 * 2, 2 * 2 * 51 * 2, 2 * 51)


def test_least_work_of_windows_counts_the_pairs_inside(monkeypatch):
    monkeypatch.setattr(ops_attention, "WINDOW", 1)
    for op, exps in (("window_relation_kl", 26), ("window_attention_mse", 0)):
        case, work = attention(op, (1, 1, 5, 2), "float32"), SPECS[op].work
        # 13 pairs: 2 + 3 + 3 + 3 + 2.
        assert (work(case, False), work(case, True)) == ((160, 104, exps), (240, 208, exps))
    case = attention("window_self_attention", (1, 1, 5, 2), "float32")
    work = SPECS[case.op].work
    assert (work(case, False), work(case, True)) == ((160, 104, 13), (320, 312, 13))
    monkeypatch.setattr(ops_attention, "glue_lengths", lambda batch, length: [4, 1])
    assert ops_attention.pairs_of(replace(case, padding="glue", heads=3)) == 3 * (10 + 1)


def test_ceilings_are_measured_here():
    found = roofline.MeasuredCeilings(CPU)
    assert found("float32") is found("float32")
    assert all(1e7 < value < 1e14 for value in found.found["float32"])


class Counted(TorchDispatchMode):
    """Bytes that are copied, flops of products and exponentials of what runs inside."""

    def __init__(self):
        super().__init__()
        self.amounts, self.dtypes = {"bytes": 0, "flops": 0, "exps": 0}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.amounts["bytes"] += args[0].nbytes + args[1].nbytes
        elif func is torch.ops.aten.mm.default:
            self.amounts["flops"] += 2 * out.numel() * args[0].shape[1]
            self.dtypes.add(out.dtype)
        elif func is torch.ops.aten.exp2.default:  # not exp, which is nine instructions of a GPU's
            self.amounts["exps"] += out.numel()
        return out


@pytest.fixture
def without_memory(monkeypatch):
    """Random tensors for any device, of sizes alone."""
    for name in ("rand", "randn"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *n, device, make=make: make(*n, device="meta"))


def test_rates_on_a_gpu_are_of_what_its_programs_do(monkeypatch, without_memory):
    counted = []

    def rate(run, amount, device):
        with Counted() as programs:
            run()
        counted.append((amount, programs))
        return amount / 2

    monkeypatch.setattr(torch, "compile", lambda program: program)
    monkeypatch.setattr(roofline, "_rate", rate)
    found = roofline.measure_ceilings(torch.device("cuda"), torch.bfloat16)
    for (amount, programs), name in zip(counted, Ceilings._fields, strict=True):
        assert programs.amounts == {"bytes": 0, "flops": 0, "exps": 0, name: amount}
        assert getattr(found, name) == amount / 2
    assert counted[1][1].dtypes == {torch.bfloat16}


def test_exponentials_of_a_cpu_are_those_of_its_faster_program(monkeypatch):
    rates = {2**17: 5.0}  # PyTorch's on all threads

    def rate(run, amount, device):
        return rates[amount]

    monkeypatch.setattr(roofline, "_rate", rate)
    monkeypatch.setattr(roofline.native, "unavailable", lambda: "not built")
    assert roofline._exps(CPU) == 5.0
    monkeypatch.setattr(roofline.native, "unavailable", lambda: None)
    monkeypatch.setattr(roofline.native, "kernels", lambda: SimpleNamespace(exp2=print))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for rates[2**15], fastest in ((3.0, 12.0), (1.0, 5.0)):  # of one thread
        assert roofline._exps(CPU) == fastest


def test_without_a_compiler_a_gpu_has_no_bound_of_exponentials(monkeypatch, without_memory):
    def fails(program):
        def run(*_):
            raise RuntimeError("no C compiler")

        return run

    def rate(run, amount, device):
        run()
        return 1e12

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(roofline, "_rate", rate)
    ceilings = roofline.MeasuredCeilings(torch.device("cuda"))
    assert ceilings("bfloat16") == (1e12, 1e12, math.inf)
    assert bound(Work(3e12, 1e12, 1e20), ceilings("bfloat16")) == (3.0, "bytes")
    assert [row.op for row in runner.ceiling_rows(ceilings, {})] == ["bytes", "flops"]


def test_a_rate_on_a_gpu_is_that_of_the_best_of_many_calls_in_a_row(monkeypatch):
    now, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def run():
        # The first calls compile, and later ones are disturbed now and then.
        calls.append(len(calls))
        now[0] += 0.5 if len(calls) < 5 or len(calls) % 40 == 0 else 0.002

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(roofline, "SECONDS", 3.0)
    assert roofline._rate(run, 6.0, torch.device("cuda")) == pytest.approx(3000.0)
