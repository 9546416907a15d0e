"""How the benchmark takes time: turns, replays, what is told of an error, and the bounds that times are held to."""

import pytest
import torch

from bertkd.bench import roofline
from bertkd.bench.cases import attention
from bertkd.bench.ops import SPECS
from bertkd.bench.roofline import Ceilings, bound
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
    order = []

    class Replay:
        note = "cuda graph"

        def __init__(self, name):
            self.name = name
            if name == "big":
                raise torch.OutOfMemoryError("too big")

        def __call__(self):
            order.append(self.name)
            return {"a": 1.0, "b": 2.0}[self.name]

    makers = {name: (lambda name=name: Replay(name)) for name in ("a", "big", "b")}
    failures = Failures(CPU)
    times, notes = replayed(makers, rounds=6, seconds=9.0, on_failure=failures)
    assert times == {"a": [1.0] * 6, "b": [2.0] * 6}
    assert notes == {"a": "cuda graph", "b": "cuda graph"}
    assert failures.found == {"big": {"status": "oom", "note": "out of memory"}}
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


def test_errors_are_told_in_a_line():
    assert told(ValueError("wrong\nand why")) == {"status": "error", "note": "ValueError: wrong"}
    assert told(KeyError())["note"] == "KeyError: "
    for error in (torch.OutOfMemoryError("x"), RuntimeError("CUDA error: Out of memory")):
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


def test_ceilings_are_measured_here():
    found = roofline.MeasuredCeilings(CPU)
    assert found("float32") is found("float32")
    assert all(1e7 < value < 1e14 for value in found.found["float32"])
