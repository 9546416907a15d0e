"""How the Triton ops are used on a GPU: graphs, streams, a compiler, dirty memory, heads that are re-split."""

import pytest
import torch
from attention_cases import ragged_mask, value_and_grads
from cuda_graphs import captured
from oracle import relative

from bertkd import functional
from bertkd.ops import verify
from bertkd.ops.implementations import implementation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
OPS = sorted(verify.TENSORS)
# It leaves out rows that weigh nothing, whose number the host has to know; test_triton_gpu.py has its capture.
NO_WAITING = [op for op in OPS if op != "linear_kl"]


def case_of(op, length=125, seed=0):
    sizes = verify.Sizes(length=length, vocabulary=1000)
    return verify.random_case(op, [torch.bfloat16] * verify.TENSORS[op], sizes, DEVICE, seed)


def launcher(op):
    return getattr(implementation("triton"), f"{op}_fwd_bwd")


def refill(case, other):
    for old, new in zip(verify._flat(case), verify._flat(other), strict=True):
        old.copy_(new)


def equal(found, wanted):
    pairs = zip(verify._flat(found), verify._flat(wanted), strict=True)
    return all(torch.equal(got, want) for got, want in pairs)


# At 700 tokens in Gram matrices.
@pytest.mark.parametrize(
    ("op", "length"), [*((op, 125) for op in NO_WAITING), ("attention_mse", 700)]
)
def test_captured_in_a_graph_and_replayed_on_new_data(op, length):
    function, case, other = launcher(op), case_of(op, length), case_of(op, length, seed=1)
    want = function(*other)
    graph, results = captured(lambda: function(*case))
    refill(case, other)
    graph.replay()
    torch.cuda.synchronize()
    assert equal(results, want)


@pytest.mark.parametrize("op", NO_WAITING)
def test_nothing_waits_for_the_device(op):
    function, case = launcher(op), case_of(op)
    want = function(*case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = function(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_runs_in_the_callers_stream(op):
    function, case, other = launcher(op), case_of(op), case_of(op, seed=1)
    want = function(*other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The new data comes late: a kernel in another stream would not wait for it.
        torch.cuda._sleep(100_000_000)
        refill(case, other)
        got = function(*case)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    assert equal(got, want)


@pytest.mark.parametrize("length", [61, 253, 700])
@pytest.mark.parametrize("op", OPS)
def test_all_of_a_result_is_written(op, length, poisoned):
    found = launcher(op)(*case_of(op, length))
    assert all(torch.isfinite(x).all() for x in verify._flat(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [40, 300])
def test_heads_are_re_split_without_a_copy(length, dtype):
    """12 heads against 6, both seen as 4."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, length, 12, 32), (2, length, 6, 40)
    x_s, x_t = (
        torch.randn(s, generator=generator).to(DEVICE, dtype).transpose(1, 2) for s in shapes
    )
    mask = ragged_mask(2, length, seed=0).to(DEVICE)
    sides = [x_s, x_s * 0.5], [x_t, x_t]
    double = [[x.double() for x in side] for side in sides]
    for loss, count in (
        (functional.attention_kl, 2),
        (functional.attention_mse, 2),
        (functional.value_relation_kl, 1),
    ):
        results = [
            value_and_grads(loss, s[:count], *t[:count], mask, impl=impl, relation_heads=4)
            for (s, t), impl in ((double, "eager"), (sides, "eager"), (sides, "triton"))
        ]
        for want, same, got in zip(*results, strict=True):
            assert relative(got, want) <= 2 * relative(same, want) + verify.TOLERANCE[dtype]


LOSSES = {
    "hidden_mse": lambda h, h_t, w: functional.hidden_mse(h, h_t, impl="triton"),
    "several states": lambda h, h_t, w: functional.hidden_mse(
        [h, h * 2], [h_t, h_t], impl="triton"
    ),
    "projected": lambda h, h_t, w: functional.hidden_mse(h, h_t, weight=w, impl="triton"),
    "cosine": lambda h, h_t, w: functional.hidden_cosine(h, h_t, impl="triton"),
    "logits": lambda h, h_t, w: functional.softmax_kl(h, h_t, impl="triton"),
    "decoders": lambda h, h_t, w: functional.linear_kl(h, w, h_t, w, impl="triton"),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_traced_without_graph_breaks(name):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    h, h_t, w = (torch.randn(n, 64, generator=generator).to(DEVICE) for n in (40, 40, 64))
    loss = LOSSES[name]
    want = value_and_grads(loss, [h], h_t, w)
    # What Inductor makes of it is tested with the attention losses.
    got = value_and_grads(torch.compile(loss, fullgraph=True, backend="aot_eager"), [h], h_t, w)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
