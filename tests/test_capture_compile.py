"""Capturing from models under torch.compile: values, gradients, and that the graph is used."""

import gc
import warnings
import weakref

import pytest
import torch
from tiny_models import gradients, tiny_batch, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from bertkd.capture import Capture

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Counter(CompileCounterWithBackend):
    """A backend that counts the graphs it compiles and how often they run."""

    def __init__(self, backend="eager"):
        super().__init__(backend)
        self.runs = 0

    def __call__(self, graph, example_inputs):
        compiled = super().__call__(graph, example_inputs)

        def run(*args):
            self.runs += 1
            return compiled(*args)

        return run


def compile_outside(model, counter):
    return torch.compile(model, backend=counter, fullgraph=True)


def compile_in_place(model, counter):
    model.compile(backend=counter, fullgraph=True)
    return model


def loss_of(recording):
    found = [*recording.q.values(), *recording.v.values(), *recording.states.values()]
    loss = sum(tensor.tanh().square().sum() for tensor in found)
    return loss + sum((recording.k[i] * recording.q[i]).mean() for i in recording.q)


def assert_same_gradients(got, want):
    assert want.keys() <= got.keys()
    for name, gradient in got.items():
        # A compiled backward gives zeros to parameters of which the loss does not depend.
        expected = want.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize(
    ("model_type", "implementation", "compile_it", "backend"),
    [
        ("bert", "sdpa", compile_outside, "aot_eager"),
        ("albert", "eager", compile_in_place, "eager"),
        ("modernbert", "sdpa", compile_in_place, "eager"),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_model(
    model_type, implementation, compile_it, backend
):
    plain = tiny_model(model_type, attn_implementation=implementation)
    batch = tiny_batch(plain)
    wanted = {"blocks": [0, 1], "states": [0, 2]}
    want = Capture(plain, **wanted)(**batch)
    loss_of(want).backward()
    want_gradients = gradients(plain)

    counter = Counter(backend)
    model = tiny_model(model_type, attn_implementation=implementation)
    capture = Capture(compile_it(model, counter), **wanted)
    for _ in range(3):
        runs = counter.runs
        got = capture(**batch, stop_early=True)
        assert (counter.frame_count, counter.runs) == (1, runs + 1)
        assert got.output is not None
        assert (got.scale, got.window) == (want.scale, want.window)
        for kind in ("q", "k", "v", "states"):
            tensors, expected = getattr(got, kind), getattr(want, kind)
            assert tensors.keys() == expected.keys()
            for index, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[index], **CLOSE)
        loss_of(got).backward()
        assert_same_gradients(gradients(model), want_gradients)

        alive = [weakref.ref(x) for x in (*got.q.values(), *got.v.values(), *got.states.values())]
        del got, tensors, tensor
        gc.collect()
        assert [reference() for reference in alive] == [None] * 6


def test_what_is_wanted_decides_which_graph_is_used():
    counter = Counter()
    model = tiny_model("bert")
    batch = tiny_batch(model)
    compiled = compile_outside(model, counter)
    # A graph compiled without capture, such as that of an evaluation, must not be taken for one.
    compiled(**batch)
    wanted = [((1,), ()), ((1,), (1,)), ((), (1, 2))]
    for _ in range(2):
        for blocks, states in wanted:
            recording = Capture(compiled, blocks=blocks, states=states)(**batch)
            assert tuple(recording.q) == blocks
            assert tuple(recording.states) == states
        assert counter.frame_count == 1 + len(wanted)
    assert counter.runs == 1 + 2 * len(wanted)
    assert model.config._attn_implementation == "sdpa"
    assert not any("bertkd" in name for m in model.modules() for name in vars(m))


def test_captures_nest_in_a_compiled_model():
    counter = Counter()
    model = tiny_model("bert", layers=1)
    batch = tiny_batch(model)
    compiled = compile_outside(model, counter)
    want = Capture(model, blocks=[0], states=[1])(**batch)
    with (
        Capture(compiled, blocks=[0]).record() as outer,
        Capture(compiled, states=[1]).record() as inner,
    ):
        compiled(**batch)
    assert (list(outer.q), list(inner.q)) == ([0], [])
    torch.testing.assert_close(outer.q[0], want.q[0])
    torch.testing.assert_close(inner.states[1], want.states[1])
    with pytest.raises(RuntimeError, match="ran twice"), Capture(compiled).record():
        compiled(**batch)
        compiled(**batch)


def test_blocks_compiled_one_by_one():
    model = tiny_model("bert")
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[0, 1], states=[0, 2])
    want = capture(**batch)
    counter = Counter()
    model.encoder.layer[0].compile(backend=counter)
    model.encoder.layer[1] = torch.compile(model.encoder.layer[1], backend=counter)
    for stop_early in (False, True):
        counter.runs = 0
        got = capture(**batch, stop_early=stop_early)
        assert counter.runs == 2
        for block in (0, 1):
            torch.testing.assert_close(got.q[block], want.q[block])
        torch.testing.assert_close(got.states[2], want.states[2])
        # After a compiled block the forward can be left.
        assert (got.output is None) == stop_early


# Dynamo warns where it traces into the machinery of the capture instead of the model alone.
@pytest.mark.filterwarnings("error:Dynamo detected a call", "error:Dynamo does not know")
def test_a_compiled_function_around_the_capture():
    model = tiny_model("bert", layers=1)
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[0], states=[1])

    def step(batch):
        recording = capture(**batch)
        return recording.q[0].square().sum() + recording.states[1].square().sum()

    step(batch).backward()
    want, want_gradients = step(batch), gradients(model)
    counter = Counter()
    compiled = torch.compile(step, backend=counter)
    for _ in range(2):
        graphs = counter.frame_count
        loss = compiled(batch)
        torch.testing.assert_close(loss, want)
        loss.backward()
        assert_same_gradients(gradients(model), want_gradients)
    assert counter.frame_count == graphs > 0
    assert model.config._attn_implementation == "sdpa"


def test_checkpointing_in_a_compiled_model():
    batch = tiny_batch(tiny_model("bert"))
    found = []
    for compiled in (False, True):
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = tiny_model("bert", layers=1, **dropouts).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": False})
        counter = Counter()
        run = torch.compile(model, backend=counter) if compiled else model
        loss = loss_of(Capture(run, blocks=[0], states=[0, 1])(**batch))
        loss.backward()
        assert (counter.runs > 0) == compiled
        found.append((loss, gradients(model)))
    (want, want_gradients), (loss, got) = found
    torch.testing.assert_close(loss, want)
    assert_same_gradients(got, want_gradients)
