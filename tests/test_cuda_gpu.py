"""impl="cuda" on a real GPU: the same cases as emulated on a CPU, larger ones, and what only a GPU shows."""

import cuda_cases
import pytest
import torch
from attention_cases import qkv, ragged_mask
from oracle import relative

from bertkd import functional
from bertkd.ops import cuda
from bertkd.ops.cuda import limits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]


@pytest.fixture(autouse=True)
def built():
    reason = cuda.unavailable()
    if reason is not None:
        pytest.skip(reason)


def skip_unless_it_fits(op, tensors):
    reason = cuda.refusal(op, tensors)
    if reason is not None and "shared memory" in reason:
        pytest.skip(reason)
    assert reason is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [1, 7, 16, 17, 63, 64, 65, 100, 128])
@pytest.mark.parametrize(("width_s", "width_t"), [(16, 24), (32, 64), (64, 64), (128, 40)])
def test_relation_kl(length, width_s, width_t, dtype):
    shape = (6, 3, length)
    sides = cuda_cases.attention_inputs(shape, width_s, width_t, dtype, device="cuda")
    skip_unless_it_fits("relation_kl", [*sides[0], *sides[1]])
    cuda_cases.check_relation(shape, width_s, width_t, dtype, device="cuda", seed=length)
    cuda_cases.check_self_relation(shape, width_s, width_t, dtype, device="cuda", seed=length)
    cuda_cases.check_relation(shape, width_s, width_t, dtype, device="cuda", masked=False)


@pytest.mark.parametrize("dtypes", [(s, t) for s in FLOATS for t in FLOATS])
@pytest.mark.parametrize("width", [1, 2, 9, 300, 1031, 8200, 30522, 128000])
def test_softmax_kl(width, dtypes):
    for offset, gap in ((0, 0), (3, 0), (1, 7)):
        cuda_cases.check_softmax(37, width, dtypes, device="cuda", offset=offset, gap=gap)


@pytest.mark.parametrize("dtypes", [(s, t) for s in FLOATS for t in FLOATS])
@pytest.mark.parametrize(("states", "width"), [(1, 768), (3, 312), (35, 37)])
def test_hidden_mse(states, width, dtypes):
    for offset, gap in ((0, 0), (3, 5)):
        cuda_cases.check_hidden(states, 501, width, dtypes, device="cuda", offset=offset, gap=gap)


def value_and_grads(loss, student, *args, **options):
    """The loss, its values weighted differently, and the gradients of that."""
    student = [x.detach().requires_grad_() for x in student]
    value = loss(*student, *args, **options)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
    weighted = (value * weights.view(value.shape)).sum()
    return [value.detach(), *torch.autograd.grad(weighted, student)]


@pytest.mark.parametrize("dtype", HALVES)
def test_public_losses(dtype):
    student = [x.cuda() for x in qkv(8, 12, 128, 64, seed=0, dtype=dtype)]
    teacher = [x.cuda() for x in qkv(8, 12, 128, 64, seed=1, dtype=dtype)]
    mask = ragged_mask(8, 128, seed=2, empty_row=True).cuda()
    for loss, given, rest in (
        (functional.attention_kl, student, teacher),
        (functional.value_relation_kl, student[:1], teacher[:1]),
    ):
        double = [[x.double() for x in side] for side in (given, rest)]
        for reduction in ("mean", "none"):
            options = {"reduction": reduction}
            exact = value_and_grads(loss, double[0], *double[1], mask, impl="eager", **options)
            eager = value_and_grads(loss, given, *rest, mask, impl="eager", **options)
            actual = value_and_grads(loss, given, *rest, mask, impl="cuda", **options)
            for got, same, want in zip(actual, eager, exact, strict=True):
                assert got.dtype == same.dtype
                assert relative(got, want) <= 2 * relative(same, want) + 1e-5


def test_compiled_and_captured_in_a_graph():
    student = [x.cuda() for x in qkv(4, 4, 64, 64, seed=0, dtype=torch.bfloat16)]
    teacher = [x.cuda() for x in qkv(4, 4, 64, 64, seed=1, dtype=torch.bfloat16)]
    weight = torch.ones(4, 4, 64, device="cuda")
    args = (weight, *student, *teacher, None, 0.125, 0.125)
    want = cuda.relation_kl_fwd_bwd(*args)

    def loss(q, k):
        return functional.attention_kl(q, k, *teacher, scale_s=0.125, scale_t=0.125, impl="cuda")

    compiled = torch.compile(loss, fullgraph=True)(*student)
    torch.testing.assert_close(compiled, loss(*student))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.relation_kl_fwd_bwd(*args)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))


def test_it_runs_on_the_current_stream():
    z_s = torch.zeros(4096, 4096, device="cuda")
    z_t = torch.randn(4096, 4096, device="cuda")
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        # Long enough for a launch on another stream to read the zeros.
        torch.cuda._sleep(50_000_000)
        z_s.copy_(z_t)
        rows = cuda.softmax_kl_rows(z_s, z_t, 1.0)
    torch.cuda.synchronize()
    assert (rows == 0).all()


def test_results_are_the_same_on_every_run():
    student = [x.cuda() for x in qkv(32, 12, 128, 64, seed=0, dtype=torch.float16)]
    teacher = [x.cuda() for x in qkv(32, 12, 128, 64, seed=1, dtype=torch.float16)]
    weight = torch.rand(32, 12, 128, device="cuda")
    args = (weight, *student, *teacher, None, 0.1, 0.1)
    first = cuda.relation_kl_fwd_bwd(*args)
    for _ in range(20):
        again = cuda.relation_kl_fwd_bwd(*args)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_equal_networks_give_exactly_zero():
    for dtype in HALVES:
        student = [x.cuda() for x in qkv(4, 3, 100, 64, seed=0, dtype=dtype)]
        weight = torch.ones(4, 3, 100, device="cuda")
        for x in cuda.relation_kl_fwd_bwd(weight, *student, *student, None, 0.125, 0.125):
            assert (x == 0).all()
    for dtype in FLOATS:
        z = torch.randn(64, 30522, device="cuda").to(dtype)
        loss, grad = cuda.softmax_kl_fwd_bwd(torch.ones(64, device="cuda"), z, z, 2.0)
        assert loss == 0
        assert (grad == 0).all()


def test_nothing_waits_for_the_device():
    student = [x.cuda() for x in qkv(2, 2, 30, 32, seed=0, dtype=torch.bfloat16)]
    mask = ragged_mask(2, 30, seed=0).bool().cuda()
    weight = torch.ones(2, 2, 30, device="cuda")
    args = (weight, *student, *student, mask, 0.1, 0.1)
    cuda.refusal("relation_kl", [*student, *student])
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.refusal("relation_kl", [*student, *student])
        cuda.relation_kl_fwd_bwd(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_it_cannot_run_is_refused_with_a_reason():
    x = torch.zeros(1, 1, 20, 32, device="cuda", dtype=torch.float16)
    cases = {
        "float32": [x.float()] * 4,
        "one dtype": [x, x, x.bfloat16(), x.bfloat16()],
        "128 tokens": [torch.zeros(1, 1, 129, 32, device="cuda", dtype=torch.float16)] * 4,
        "multiples of 8": [x[..., :20]] * 4,
        "16-byte boundaries": [torch.zeros(700, device="cuda").half()[1:641].view(1, 1, 20, 32)]
        * 4,
        "CUDA tensors": [x.cpu()] * 4,
    }
    for reason, tensors in cases.items():
        assert reason in cuda.refusal("relation_kl", tensors)
        with pytest.raises(ValueError, match="chunked"):
            functional.attention_kl(*tensors, impl="cuda")
    assert "float64" in cuda.refusal("softmax_kl", [torch.zeros(2, 2, device="cuda").double()] * 2)
    assert "no CUDA kernel" in cuda.refusal("linear_kl", [x])


def test_an_error_of_cuda_is_an_exception_that_names_the_kernel(monkeypatch):
    # The library itself refuses a head that does not fit, whatever Python believed.
    x = torch.zeros(1, 1, 128, 128, device="cuda", dtype=torch.float16)
    monkeypatch.setattr(limits, "_shared_limit", lambda index: 1 << 30)
    if limits.kernels().shared_limit(0) >= limits._shared_bytes(128, 128, 128, False):
        pytest.skip("every head fits on this GPU")
    with pytest.raises(ValueError, match="shared memory"):
        cuda.relation_kl_rows(x, x, x, x, None, 1.0, 1.0)
