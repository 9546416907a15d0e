"""What a capture leaves behind (nothing), nesting, stopping early, distributed wrappers."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import ALL_TYPES, OWN_ATTENTION, tiny_batch, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bertkd import _attention, cpu_attention
from bertkd.capture import Capture
from bertkd.encoders import attention_modules, base_model, block_list
from bertkd.errors import UnsupportedEncoderError
from bertkd.student import create_student

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def snapshot(model):
    """Everything a capture might alter: configs, attributes and hooks of every module."""
    state = {}
    for name, module in model.named_modules():
        hooks = {kind: list(getattr(module, kind)) for kind in HOOKS}
        values = {k: id(v) for k, v in vars(module).items() if k not in HOOKS}
        config = dict(vars(module.config)) if hasattr(module, "config") else None
        state[name] = (hooks, values, config)
    return state


def counting(model):
    """Count how often each block's attention and output run."""
    ran = []
    for block in dict.fromkeys(block_list(model)):
        block.register_forward_hook(lambda module, args, output: ran.append("block"))
    for module in dict.fromkeys(attention_modules(model)):
        module.register_forward_hook(lambda module, args, output: ran.append("attention"))
    return ran


class Failure(Exception):
    pass


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_the_model_is_left_as_it_was(model_type):
    model = tiny_model(model_type, layers=3, head_cls="sequence")
    batch = tiny_batch(model)
    model.register_forward_hook(lambda *args: None)
    block_list(model)[0].register_forward_pre_hook(lambda *args: None)
    before = snapshot(model)
    capture = Capture(model, blocks=[1], states=[0, 2])
    assert snapshot(model) == before

    capture(**batch)
    assert snapshot(model) == before
    assert capture(**batch, stop_early=True).output is None
    assert snapshot(model) == before
    with capture.record():
        assert snapshot(model) != before
        model(**batch)
    assert snapshot(model) == before


@pytest.mark.parametrize("model_type", ["bert", "albert", "modernbert"])
def test_the_model_is_left_as_it_was_after_an_exception(model_type):
    model = tiny_model(model_type, layers=3)
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[0, 2], states=[3])
    broken = block_list(model)[-1].register_forward_pre_hook(fail)
    before = snapshot(model)
    for stop_early in (False, True):
        with pytest.raises(Failure):
            capture(**batch, stop_early=stop_early)
        assert snapshot(model) == before
    with pytest.raises(Failure), capture.record():
        raise Failure
    assert snapshot(model) == before
    broken.remove()
    assert list(capture(**batch).q) == [0, 2]


def fail(module, args):
    raise Failure


def test_half_attached_listeners_are_taken_off():
    model = tiny_model("bert")
    capture = Capture(model, blocks=[0])
    model.encoder.layer[1].attention.self.config = nn.Module()  # names no implementation
    before = snapshot(model.encoder.layer[0])
    with pytest.raises(AttributeError):
        capture(**tiny_batch(model))
    assert snapshot(model.encoder.layer[0]) == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["bert", "albert", "modernbert"])
@pytest.mark.parametrize("train", [False, True])
def test_tensors_die_with_their_recording(model_type, train):
    model = tiny_model(model_type, layers=3).train(train)
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[0, 1], states=[0, 2])
    gc.collect()
    gc.disable()
    try:
        for stop_early in (False, True):
            recording = capture(**batch, stop_early=stop_early)
            kept = (recording.q, recording.k, recording.v, recording.states)
            alive = [weakref.ref(tensor) for kind in kept for tensor in kind.values()]
            assert len(alive) == 8
            # A step in between, such as an evaluation, neither keeps nor replaces anything.
            model(**batch)
            assert all(reference() is not None for reference in alive)
            del recording, kept
            assert [reference() for reference in alive] == [None] * 8
    finally:
        gc.enable()


def test_tensors_die_when_the_forward_fails():
    model = tiny_model("bert")
    seen = []
    model.encoder.layer[0].register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output))
    )
    model.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(Failure):
        Capture(model, states=[1, 2])(**tiny_batch(model))
    gc.collect()
    assert seen[0]() is None


def test_captures_of_one_model_nest():
    model = tiny_model("bert", layers=3)
    batch, other = tiny_batch(model), tiny_batch(model, seed=1)
    before = snapshot(model)
    outer, inner = Capture(model, blocks=[0, 1], states=[3]), Capture(model, blocks=[1, 2])
    want_outer, want_inner = outer(**batch), inner(**batch)
    with outer.record() as first, inner.record() as second:
        model(**batch)
    for got, want in ((first, want_outer), (second, want_inner)):
        assert got.q.keys() == want.q.keys()
        assert got.states.keys() == want.states.keys()
        assert all(torch.equal(got.q[i], want.q[i]) for i in want.q)
    assert snapshot(model) == before

    # The inner one has come and gone before the outer one's forward: a forward of its own.
    with outer.record() as first:
        model(**batch)
        with pytest.raises(RuntimeError, match="ran twice"):
            inner(**other)
    assert torch.equal(first.q[1], want_outer.q[1])
    assert snapshot(model) == before


def test_teacher_and_student_may_share_a_config():
    teacher, student = tiny_model("bert", seed=1), tiny_model("bert", seed=2)
    student.config = teacher.config
    for module in attention_modules(student):
        module.config = teacher.config
    batch = tiny_batch(teacher)
    want = [Capture(model, blocks=[0, 1])(**batch).q[1] for model in (teacher, student)]
    one, two = Capture(teacher, blocks=[0, 1]), Capture(student, blocks=[0, 1])
    with one.record() as of_teacher:
        of_student = two(**batch)
        teacher(**batch)
    assert torch.equal(of_teacher.q[1], want[0])
    assert torch.equal(of_student.q[1], want[1])
    assert teacher.config._attn_implementation == "sdpa"


def test_configs_apart_from_the_models_are_followed():
    """A model whose attention modules hold another config object than the model itself."""
    model, other = tiny_model("bert"), tiny_model("bert").config
    model.config = other
    assert list(Capture(model, blocks=[1])(**tiny_batch(model)).q) == [1]
    assert other._attn_implementation == "sdpa"


def test_a_capture_can_be_used_again_and_again():
    model = tiny_model("albert", layers=4)
    capture = Capture(model, blocks=[2], states=[4])
    for seed in range(3):
        batch = tiny_batch(model, seed=seed, length=8 + seed)
        want = model(**batch, output_hidden_states=True).hidden_states[4]
        assert torch.equal(capture(**batch).states[4], want)


def test_one_recording_holds_one_forward():
    model = tiny_model("bert")
    batch = tiny_batch(model)
    with (
        pytest.raises(RuntimeError, match=r"twice.*new record\(\)"),
        Capture(model, blocks=[0]).record(),
    ):
        model(**batch)
        model(**batch)


def test_what_does_not_come_by_is_reported():
    model = tiny_model("bert", layers=3)
    with (
        pytest.raises(RuntimeError, match=r"not captured: block 0, block 2, state 1\."),
        Capture(model, blocks=[2, 0], states=[1]).record(),
    ):
        pass
    attention = model.encoder.layer[1].attention.self
    attention.forward = lambda hidden, *args, **kwargs: (hidden, None)
    with pytest.raises(RuntimeError, match=r"not captured: block 1\."):
        Capture(model, blocks=[0, 1])(**tiny_batch(model))


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_stopping_early_runs_no_block_too_many(model_type):
    model = tiny_model(model_type, layers=4, head_cls="sequence")
    batch = tiny_batch(model)
    whole = Capture(model, blocks=[1], states=[0, 3])(**batch)
    ran = counting(model)
    for wanted, count in (
        # Within block 1 only its attention's input is computed, within block 2 everything.
        ({"blocks": [1]}, (1, 1)),
        ({"blocks": [0], "states": [2]}, (2, 2)),
        ({"blocks": [1], "states": [1]}, (1, 1)),
        ({"states": [0]}, (0, 0)),
        ({}, (4, 4)),
    ):
        ran.clear()
        recording = Capture(model, **wanted)(**batch, stop_early=True)
        assert (ran.count("block"), ran.count("attention")) == count
        assert (recording.output is None) == (wanted != {})
        for block in recording.q.keys() & {1}:
            assert torch.equal(recording.q[block], whole.q[block])
        for state in recording.states.keys() & {0, 3}:
            assert torch.equal(recording.states[state], whole.states[state])


def test_stopping_early_leaves_gradients_intact():
    model = tiny_model("modernbert", layers=3).train()
    batch = tiny_batch(model)
    capture = Capture(model, blocks=[1], states=[1])
    found = []
    for stop_early in (False, True):
        recording = capture(**batch, stop_early=stop_early)
        (recording.q[1].square().sum() + recording.states[1].square().sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_distributed_data_parallel_is_looked_through(process_group):
    model = tiny_model("bert", head_cls="sequence")
    batch = tiny_batch(model)
    want = Capture(model, blocks=[1], states=[1])(**batch)
    wrapped = nn.parallel.DistributedDataParallel(model)
    capture = Capture(wrapped, blocks=[1], states=[1])
    assert base_model(wrapped) is model.bert
    before = snapshot(model)
    # Stopping would skip the wrapper's preparation of its gradient exchange.
    for stop_early in (False, True):
        recording = capture(**batch, stop_early=stop_early)
        assert torch.equal(recording.q[1], want.q[1])
        assert torch.equal(recording.output.logits, want.output.logits)
        # The wrapper waits for the gradients of all that its output depends on.
        (recording.q[1].sum() + recording.output.logits.sum()).backward()
        assert base_model(model).embeddings.word_embeddings.weight.grad is not None
        model.zero_grad()
    assert snapshot(model) == before


def test_fully_sharded_models_are_captured_whole(process_group):
    model = tiny_model("bert", head_cls="sequence")
    batch = tiny_batch(model)
    want = Capture(model, blocks=[0], states=[1])(**batch)
    (want.q[0].sum() + want.states[1].square().sum()).backward()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    want_gradient = model.get_parameter(name).grad
    model.zero_grad(set_to_none=True)

    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.bert.encoder.layer, model):
        fully_shard(module, mesh=mesh)
    before = snapshot(model)
    capture = Capture(model, blocks=[0], states=[1])
    for stop_early in (False, True):
        got = capture(**batch, stop_early=stop_early)
        assert got.output is not None
        torch.testing.assert_close(got.q[0], want.q[0])
        (got.q[0].sum() + got.states[1].square().sum()).backward()
        torch.testing.assert_close(model.get_parameter(name).grad.full_tensor(), want_gradient)
        model.zero_grad(set_to_none=True)
    assert snapshot(model).keys() == before.keys()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(UnsupportedEncoderError, match="sharded over processes"):
        create_student(model, "first:1")


@pytest.mark.parametrize("model_type", ["bert", *OWN_ATTENTION])
def test_threads_that_share_a_model_wait_for_each_other(model_type):
    model = tiny_model(model_type, layers=4)
    attention = model.config._attn_implementation
    batches = [tiny_batch(model, batch=4, length=48, seed=seed) for seed in range(3)]

    def capture(batch):
        with torch.no_grad():
            return Capture(model, blocks=[3], states=[2])(stop_early=True, **batch)

    want = [capture(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(capture, batches * 40))
    for i, found in enumerate(got):
        assert torch.equal(found.q[3], want[i % 3].q[3])
        assert torch.equal(found.states[2], want[i % 3].states[2])
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("instead", [None, cpu_attention.NAME])
@pytest.mark.parametrize("begins", ["before", "during"])
def test_a_plain_call_in_another_thread_is_neither_recorded_nor_disturbed(begins, instead):
    model = tiny_model("bert", layers=4)
    # As many texts as tokens: a mask of pads (B, L) would pass for SDPA's.
    mine, other = (tiny_batch(model, batch=8, length=8, seed=seed) for seed in range(2))
    capture = Capture(model, blocks=[1, 3], states=[2], instead_of_sdpa=instead)
    with torch.no_grad():
        want, want_plain = capture(**mine), model(**other).last_hidden_state

    here, has_begun, may_end = threading.get_ident(), threading.Event(), threading.Event()
    calls = []

    def meet(*_):
        if threading.get_ident() != here:
            has_begun.set()
            assert may_end.wait(20)
        elif begins == "during":
            begin()
        else:
            end()

    @torch.no_grad()
    def plain():
        return model(**other).last_hidden_state

    def begin():
        calls.append(pool.submit(plain))
        assert has_begun.wait(20)

    def end():
        may_end.set()
        torch.testing.assert_close(calls[0].result(), want_plain)

    model.encoder.layer[1].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        if begins == "before":
            begin()
        got = capture(**mine)
        if begins == "during":
            end()
    for part in "qkv":
        torch.testing.assert_close(getattr(got, part), getattr(want, part))
    torch.testing.assert_close(got.states, want.states)


def test_no_lock_outlives_its_model():
    model = tiny_model("bert")
    Capture(model, blocks=[0])(**tiny_batch(model))
    number = id(model.config)
    assert number in _attention._LOCKS
    del model
    gc.collect()
    assert number not in _attention._LOCKS
