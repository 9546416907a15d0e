"""Models that attend with bertkd's kernel: the same results as with SDPA, and SDPA wherever it must be."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from native_cases import needs_native
from tiny_models import MODEL_TYPES, tiny_batch, tiny_model
from torch import nn

import bertkd
from bertkd import cpu_attention
from bertkd.cpu_attention import NAME, attend, make_mask, use_cpu_attention

pytestmark = needs_native


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the kernel is called with, the dropout, and the window."""
    seen = []
    kernel = cpu_attention.self_attention

    def counted(query, *args, **options):
        seen.append((tuple(query.shape), options["dropout"], options["window"]))
        return kernel(query, *args, **options)

    monkeypatch.setattr(cpu_attention, "self_attention", counted)
    # A batch of the tests has fewer heads than some machines have threads.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return seen


def state_and_gradients(model, batch):
    model.zero_grad()
    state = model(**batch).last_hidden_state
    mask = batch.get("attention_mask")
    real = state if mask is None else state[mask.bool()]
    real.square().sum().backward()
    # Of a pooler that nothing depends on there is no gradient, or, where it is compiled, zeros.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [real.detach(), *grads]


def assert_close(actual, expected):
    """By the largest number of all: the exact gradient of a key's bias is 0."""
    assert len(actual) == len(expected) > 10
    torch.testing.assert_close(actual[0], expected[0], atol=2e-5, rtol=1e-4)
    largest = max(x.abs().max().item() for x in expected[1:])
    for got, want in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("padding", [None, "right", "left", "ragged"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_computes_what_it_did(model_type, padding, calls):
    overrides = {"local_attention": 8} if model_type == "modernbert" else {}
    model = tiny_model(model_type, layers=3, **overrides)
    batch = tiny_batch(model, padding=padding)
    expected = state_and_gradients(model, batch)
    assert use_cpu_attention(model) is None
    actual = state_and_gradients(model, batch)
    assert_close(actual, expected)
    # ModernBERT's first block attends to everything, the next two to a window.
    local = 4 if model_type == "modernbert" else None
    assert [window for *_, window in calls] == [None, local, local]


def test_dropout_is_the_kernels_and_follows_the_seed(calls):
    model = tiny_model("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
    batch = tiny_batch(model, padding="right")
    use_cpu_attention(model)

    def state(seed):
        torch.manual_seed(seed)
        return model(**batch).last_hidden_state

    first = state(0)
    assert {dropout for _, dropout, _ in calls} == {0.3}
    assert torch.equal(first, state(0))
    assert not torch.allclose(first, state(1))


def test_checkpointed_blocks_give_the_same_gradients(calls):
    model = tiny_model("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
    batch = tiny_batch(model, padding="right")
    use_cpu_attention(model)
    torch.manual_seed(0)
    expected = state_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    for got, want in zip(state_and_gradients(model, batch), expected, strict=True):
        assert torch.equal(got, want)
    assert len(calls) == 6


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_compiled_model_computes_the_same(model_type, calls):
    torch._dynamo.reset()
    model = tiny_model(model_type, **({"local_attention": 8} if model_type == "modernbert" else {}))
    batch = tiny_batch(model, padding="right")
    expected = state_and_gradients(model, batch)
    use_cpu_attention(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_close(state_and_gradients(compiled, batch), expected)
    assert calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_is_exported_for_other_runtimes_holds_operators_of_pytorch_only(
    tmp_path, calls, monkeypatch
):
    model = tiny_model("bert", return_dict=False)
    names = ("input_ids", "attention_mask")
    one, other = (tiny_batch(model, length=length) for length in (12, 9))
    wanted = [model(**{name: batch[name] for name in names})[0] for batch in (one, other)]
    use_cpu_attention(model)
    ids = tuple(one[name] for name in names)
    traced = torch.jit.trace(model, ids, strict=False, check_trace=False)
    traced.save(tmp_path / "traced.pt")  # refuses what TorchScript does not know
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model(**one)
    assert not calls
    monkeypatch.undo()
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for batch, want in zip((one, other), wanted, strict=True):
        torch.testing.assert_close(loaded(*[batch[name] for name in names])[0], want)


def heads(length=6, keys=None, dtype=torch.float32):
    return [torch.randn(2, 2, n, 8, dtype=dtype) for n in (length, keys or length)]


@pytest.mark.parametrize(
    ("options", "module_is_causal", "mask"),
    [
        ({"is_causal": True}, False, None),
        ({}, True, None),
        ({}, False, torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()),
        ({"sliding_window": 2}, False, torch.ones(2, 1, 6, 6, dtype=torch.bool).triu(-1)),
        ({"position_bias": torch.randn(1, 2, 6, 6)}, False, None),
    ],
)
def test_what_the_kernel_cannot_do_goes_to_sdpa(options, module_is_causal, mask, calls):
    module = nn.Module()
    module.is_causal = module_is_causal
    query, key = heads()
    sdpa = cpu_attention._sdpa()
    want, _ = sdpa(module, query, key, key, mask, **options)
    got, weights = attend(module, query, key, key, mask, **options)
    assert torch.equal(got, want)
    assert weights is None
    assert calls == []


@pytest.mark.parametrize(
    ("query", "key", "dropout", "kernel"),
    [
        (*heads(), 0.0, True),
        (*heads(6, 4), 0.0, False),
        (*heads(dtype=torch.float64), 0.1, False),
        (*heads(dtype=torch.bfloat16), 0.0, True),
        (*heads(dtype=torch.float16), 0.0, True),
        (*heads(dtype=torch.bfloat16), 0.1, True),
        # Two heads of one sequence for three threads: only where SDPA would make maps.
        (*[x[:1, :1] for x in heads()], 0.0, False),
        (*[x[:1, :1] for x in heads()], 0.1, True),
    ],
)
def test_when_the_kernel_is_the_choice(query, key, dropout, kernel, calls, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_attention, "isa", lambda: "avx2")
    module = nn.Module()
    module.is_causal = False
    mask = torch.ones(len(query), key.shape[2], dtype=torch.bool)
    mask[0, 2:] = False
    out, _ = attend(module, query, key, key, mask, dropout=dropout)
    assert out.shape == (len(query), query.shape[2], query.shape[1], 8)
    assert bool(calls) == kernel
    if not dropout:
        keys = mask[:, None, None, :].expand(-1, -1, query.shape[2], -1)
        q, k = query.double(), key.double()
        want = nn.functional.scaled_dot_product_attention(q, k, k, keys)
        torch.testing.assert_close(out.transpose(1, 2), want.to(out.dtype))


@pytest.mark.parametrize(("amx", "isa"), [(True, "avx512"), (False, "portable")])
@pytest.mark.parametrize(
    ("dtype", "dropout", "kernel"),
    [(torch.bfloat16, 0.0, False), (torch.bfloat16, 0.1, True), (torch.float32, 0.0, True)],
)
def test_half_precision_is_left_to_better_instructions(
    amx, isa, dtype, dropout, kernel, calls, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(cpu_attention, "isa", lambda: isa)
    query, key = heads(dtype=dtype)
    module = nn.Module()
    module.is_causal = False
    attend(module, query, key, key, None, dropout=dropout)
    assert bool(calls) == kernel


def window_masks(length=10, window=2, **options):
    """The mask of pads and a window for the kernel, and SDPA's."""
    from transformers.masking_utils import create_bidirectional_sliding_window_mask

    pads = torch.ones(2, length, dtype=torch.bool)
    pads[0, length - 4 :] = False
    config = tiny_model("modernbert", local_attention=2 * window).config
    masks = []
    for config._attn_implementation in (NAME, "sdpa"):
        masks.append(
            create_bidirectional_sliding_window_mask(
                config=config,
                inputs_embeds=torch.zeros(2, length, 4),
                attention_mask=pads,
                **options,
            )
        )
    return masks


@pytest.mark.parametrize(
    ("dtype", "dropout", "kernel"),
    [(torch.float32, 0.0, True), (torch.float32, 0.5, True), (torch.float64, 0.0, False)],
)
def test_a_window_is_the_masks(dtype, dropout, kernel, calls):
    cpu_attention.register()
    ours, theirs = window_masks()
    assert ours.shape == (2, 10, 3)
    assert theirs.shape == (2, 1, 10, 10)
    query, key = heads(10, dtype=dtype)
    module = nn.Module()
    # Whether the number that a model hands over is one more than the mask allows is its own affair.
    for number in (2, 3):
        out, _ = attend(module, query, key, key, ours, dropout=dropout, sliding_window=number)
    assert [window for *_, window in calls] == ([2, 2] if kernel else [])
    if not dropout:
        want = nn.functional.scaled_dot_product_attention(query, key, key, theirs)
        # Two of the pads see no real token.
        rows = theirs.any(-1).expand(-1, 2, -1)
        torch.testing.assert_close(out.transpose(1, 2)[rows], want[rows])


def test_a_window_that_something_is_added_to_is_made_in_full():
    cpu_attention.register()
    ours, theirs = window_masks(and_mask_function=lambda b, h, q, k: k != 1)
    assert torch.equal(ours, theirs)
    assert not ours[..., 1].any()


def test_masks_that_are_more_than_pads_are_made_in_full():
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    pads = torch.ones(2, 6, dtype=torch.bool)
    pads[0, 4:] = False
    sizes = {"batch_size": 2, "q_length": 6, "kv_length": 6, "attention_mask": pads}
    both = {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    assert make_mask(**sizes, **both) is pads
    for change in (
        {"mask_function": causal_mask_function},
        {"allow_is_bidirectional_skip": False},
    ):
        mask = make_mask(**sizes, **(both | change), allow_is_causal_skip=False)
        assert mask.shape == (2, 1, 6, 6)
        assert not mask[0, :, :, 4:].any()


def test_why_a_model_is_left_alone(monkeypatch):
    assert "'eager', not 'sdpa'" in use_cpu_attention(
        tiny_model("bert", attn_implementation="eager")
    )
    model = tiny_model("bert")
    monkeypatch.setattr(cpu_attention, "unavailable", lambda: "bertkd._C is not built: no g++")
    assert use_cpu_attention(model) == "bertkd._C is not built: no g++"
    assert use_cpu_attention(tiny_model("bert").to("meta")) == "it is on meta"
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(TypeError, match="model must be a Hugging Face PreTrainedModel, got Linear"):
        use_cpu_attention(nn.Linear(2, 2))


def test_it_is_in_no_checkpoint(tmp_path):
    model = tiny_model("bert")
    use_cpu_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    again = type(model).from_pretrained(tmp_path, attn_implementation=NAME)
    assert again.config._attn_implementation == NAME


@pytest.mark.parametrize(
    ("options", "lent"),
    [
        ({}, True),
        ({"impl": "native"}, True),
        ({"impl": "chunked"}, False),
        ({"impl": "eager"}, False),
        ({"attention": "keep"}, False),
    ],
)
def test_a_distiller_lends_it_to_both_models_for_a_forward(options, lent, monkeypatch, calls):
    monkeypatch.delenv("BERTKD_IMPL", raising=False)
    teacher = tiny_model("bert", layers=2)
    student = bertkd.create_student(teacher, "first:1", verbose=False)
    distiller = bertkd.Distiller(teacher, student, "att_kl + hid_seq", **options)
    batch = tiny_batch(teacher, padding="right")
    loss = distiller(batch).loss
    loss.backward()
    assert len(calls) == (3 if lent else 0)
    # The models stay what they are, for pickles, exports and other processes.
    assert [m.config._attn_implementation for m in (teacher, student)] == ["sdpa"] * 2
    chosen = NAME if lent else "sdpa"
    assert str(distiller.plan(1, 8)).count(f", {chosen} attention") == 2
    kept = bertkd.Distiller(teacher, student, "att_kl + hid_seq", attention="keep")
    torch.testing.assert_close(loss, kept(batch).loss)
    # On another device SDPA has kernels of its own.
    distiller.to("meta")
    assert ", sdpa attention" in str(distiller.plan(1, 8))


def test_checkpointed_blocks_keep_sdpa_in_a_distiller(calls):
    """They run again in the backward, when nothing is lent any more."""
    teacher = tiny_model("bert", layers=2)
    options = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0}
    student = tiny_model("bert", layers=2, seed=1, **options).train()
    batch = tiny_batch(teacher, padding="right")
    distiller = bertkd.Distiller(teacher, student, "att_kl + hid_seq")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        calls.clear()
        torch.manual_seed(0)
        student.zero_grad()
        distiller(batch).loss.backward()
        found.append(len(calls))
    assert found == [4, 2]


def test_a_pickled_distiller_runs_in_a_process_that_knows_nothing(tmp_path):
    teacher, student = tiny_model("bert", layers=2), tiny_model("bert", seed=1)
    batch = tiny_batch(teacher, padding="right")
    distiller = bertkd.Distiller(teacher, student, "att_kl")
    explicit = copy.deepcopy(distiller)
    use_cpu_attention(explicit.student)
    torch.save((distiller, explicit, student, batch), tmp_path / "d.pt")
    program = f"""
import torch
distiller, explicit, student, batch = torch.load({str(tmp_path / "d.pt")!r}, weights_only=False)
student(**batch)
print(float(distiller(batch).loss.detach()), float(explicit(batch).loss.detach()))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    want = float(distiller(batch).loss.detach())
    assert [float(x) for x in done.stdout.split()] == pytest.approx([want, want], rel=1e-5)


def test_a_distiller_takes_no_other_attention():
    teacher = tiny_model("bert")
    student = bertkd.create_student(teacher, "first:1", verbose=False)
    with pytest.raises(ValueError, match="attention"):
        bertkd.Distiller(teacher, student, "att_kl", attention="flash")
