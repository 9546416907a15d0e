"""The Triton kernels on a real GPU, where the interpreter's proof ends: run by `make gpu`."""

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from cuda_graphs import captured
from oracle import relative

import bertkd
from bertkd import functional
from bertkd.ops import dispatch, verify
from bertkd.ops.implementations import implementation
from bertkd.ops.schema import value_form

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Among the lengths of a test are a short one and, where that is a form of its own, 700: from 641 on attention_mse takes
# Gram matrices for heads of width 64.
ATTENTION = {
    "attention_kl": lambda q, k, q_t, k_t, *mask, **o: functional.attention_kl(
        q, k, q_t, k_t, *mask, **o
    ),
    "value_relation_kl": lambda q, k, q_t, k_t, *mask, **o: (
        functional.value_relation_kl(q, q_t, *mask, **o)
        + functional.value_relation_kl(k, k_t, *mask, **o)
    ),
    "attention_mse": lambda q, k, q_t, k_t, *mask, **o: functional.attention_mse(
        q, k, q_t, k_t, *mask, **o
    ),
    "attention_kl, window": lambda q, k, q_t, k_t, *mask, **o: functional.attention_kl(
        q, k, q_t, k_t, *mask, window=50, **o
    ),
    "attention_mse, window": lambda q, k, q_t, k_t, *mask, **o: functional.attention_mse(
        q, k, q_t, k_t, *mask, window=50, **o
    ),
}


def on_gpu(tensors):
    # `.cuda()` of a view keeps its strides: (B, L, H, D) memory seen as (B, H, L, D).
    return [x.cuda() for x in tensors]


# Each is compiled anew, a second or two a kernel: every width in bfloat16, the common one in all.
KINDS = [((n, m), torch.bfloat16) for n, m in [(16, 16), (32, 64), (64, 64), (128, 128), (40, 24)]]
KINDS += [((64, 64), torch.float16), ((32, 16), torch.float16), ((64, 64), torch.float32)]


@pytest.mark.parametrize("length", [1, 17, 64, 127, 128, 200, 513])
@pytest.mark.parametrize(("widths", "dtype"), KINDS)
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_attention_errs_at_most_twice_as_much_as_eager(name, widths, dtype, length):
    loss = ATTENTION[name]
    student = on_gpu(qkv(3, 4, length, widths[0], seed=0, dtype=dtype))
    teacher = on_gpu(qkv(3, 4, length, widths[1], seed=1, dtype=dtype))
    mask = ragged_mask(3, length, seed=2, empty_row=True).cuda()
    for reduction in ("mean", "none"):
        double = [[x.double() for x in side] for side in (student, teacher)]
        options = {"reduction": reduction}
        exact = value_and_grads(loss, double[0], *double[1], mask, impl="eager", **options)
        eager = value_and_grads(loss, student, *teacher, mask, impl="eager", **options)
        actual = value_and_grads(loss, student, *teacher, mask, impl="triton", **options)
        tolerance = verify.TOLERANCE[dtype]
        for got, same, want in zip(actual, eager, exact, strict=True):
            assert got.dtype == same.dtype
            assert relative(got, want) <= 2 * relative(same, want) + tolerance


# Those with weights come with a bias, attention with a mask; without one at the shortest length, attention at all.
CASES = [(op, length, {}) for op in sorted(verify.TENSORS) for length in (61, 253, 700)]
CASES += [
    (op, 61, {"bias": False}) for op in ("hidden_proj_mse", "hidden_combine_mse", "linear_kl")
]
CASES += [(op, length, {"masked": False}) for op in verify.ATTENTION for length in (61, 253, 700)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "length", "without"), CASES)
def test_every_op_agrees_with_float64(op, length, without, dtype):
    sizes = verify.Sizes(length=length, vocabulary=30522, **without)
    case = verify.random_case(op, [dtype] * verify.TENSORS[op], sizes, "cuda")
    for form in ("fwd_bwd", value_form(op)):
        found = verify.compare(op, "triton", case, form)
        assert found.agrees, (form, found)


@pytest.mark.parametrize("mixed", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("op", [*verify.ATTENTION, "softmax_kl"])
def test_student_and_teacher_of_different_dtypes(op, mixed):
    count = verify.TENSORS[op] // 2
    dtypes = [mixed[0]] * count + [mixed[1]] * count
    for length in (61, 253):
        case = verify.random_case(op, dtypes, verify.Sizes(length=length), "cuda")
        assert verify.compare(op, "triton", case).agrees


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [100, 700])
@pytest.mark.parametrize("op", sorted(verify.TENSORS))
def test_bitwise_equal_over_100_runs(op, length, dtype):
    sizes = verify.Sizes(batch=8, length=length)
    case = verify.random_case(op, [dtype] * verify.TENSORS[op], sizes, "cuda")
    function = getattr(implementation("triton"), f"{op}_fwd_bwd")
    first = verify._flat(function(*case))
    for _ in range(100):
        for once, again in zip(first, verify._flat(function(*case)), strict=True):
            assert torch.equal(once, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [100, 700])
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_equal_networks_give_exactly_zero(name, length, dtype):
    student = on_gpu(qkv(2, 4, length, 64, seed=0, dtype=dtype))
    mask = ragged_mask(2, length, seed=1).cuda()
    for result in value_and_grads(ATTENTION[name], student, *student, mask, impl="triton"):
        assert (result == 0).all()


@pytest.mark.parametrize("length", [100, 700])
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_captured_in_a_graph_and_replayed_on_new_data(name, length):
    student = on_gpu(qkv(2, 4, length, 64, seed=0, dtype=torch.bfloat16))
    teacher = on_gpu(qkv(2, 4, length, 64, seed=1, dtype=torch.bfloat16))
    mask = ragged_mask(2, length, seed=2).cuda()

    def run():
        return value_and_grads(ATTENTION[name], student, *teacher, mask, impl="triton")

    graph, results = captured(run)
    for x in (*student, *teacher):
        x.copy_(torch.randn_like(x))
    mask.copy_(ragged_mask(2, length, seed=9))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(results, run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("batch", [1, 8])
def test_linear_kl_makes_no_gradient_of_a_frozen_decoder(batch):
    sizes = verify.Sizes(batch=batch, length=512, widths=(128, 64), vocabulary=30522)
    *case, decoder_grad = verify.random_case("linear_kl", [torch.bfloat16] * 4, sizes, "cuda")
    assert decoder_grad
    function = implementation("triton").linear_kl_fwd_bwd
    loss, grad_h, *_ = function(*case, True)
    alone = function(*case, False)
    assert torch.equal(alone[0], loss)
    assert torch.equal(alone[1], grad_h)
    assert [x.numel() for x in alone[2:]] == [0, 0]


def test_linear_kl_is_captured_after_a_warm_up_on_fewer_rows():
    """The warm-up leaves out rows of weight 0; a capture cannot look, takes all, and may not compile for that."""
    sizes = verify.Sizes(batch=8, length=512, widths=(128, 128), vocabulary=30522)
    case = verify.random_case("linear_kl", [torch.bfloat16] * 4, sizes, "cuda")
    function = implementation("triton").linear_kl_fwd_bwd
    want = function(*case)
    graph, results = captured(lambda: function(*case))
    graph.replay()
    torch.cuda.synchronize()
    for got, same in zip(verify._flat(results), verify._flat(want), strict=True):
        assert relative(got, same) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_get_the_factor_that_comes_down_the_graph(factor, dtype):
    """In place where the graph is freed, by a kernel of ours; not where it is kept, by PyTorch's."""
    student = [x.requires_grad_() for x in on_gpu(qkv(2, 4, 100, 64, seed=0, dtype=dtype))]
    teacher = on_gpu(qkv(2, 4, 100, 64, seed=1, dtype=dtype))
    loss = functional.attention_kl(*student, *teacher, impl="triton", reduction="sum") * factor
    kept = torch.autograd.grad(loss, student, retain_graph=True)
    freed = torch.autograd.grad(loss, student)
    for once, again in zip(kept, freed, strict=True):
        assert torch.equal(once, again)
        assert once.norm() > 0


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_compiled_without_graph_breaks(name):
    student = on_gpu(qkv(2, 4, 80, 64, seed=0, dtype=torch.bfloat16))
    teacher = on_gpu(qkv(2, 4, 80, 64, seed=1, dtype=torch.bfloat16))
    compiled = torch.compile(ATTENTION[name], fullgraph=True)
    plain = value_and_grads(ATTENTION[name], student, *teacher, impl="triton")
    fast = value_and_grads(compiled, student, *teacher, impl="triton")
    for got, want in zip(fast, plain, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [8192, 16384])
def test_memory_at_long_sequences_is_a_fraction_of_the_maps(length):
    student = on_gpu(qkv(1, 12, length, 64, seed=0, dtype=torch.bfloat16))
    teacher = on_gpu(qkv(1, 12, length, 64, seed=1, dtype=torch.bfloat16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = value_and_grads(functional.attention_kl, student, *teacher, impl="triton")
    extra = torch.cuda.max_memory_allocated() - before
    assert all(torch.isfinite(x).all() for x in results)
    # Eager keeps at least four float32 maps.
    assert extra < 0.02 * 4 * 12 * length**2 * 4


def test_nothing_waits_for_the_device():
    student = on_gpu(qkv(2, 4, 200, 64, seed=0, dtype=torch.bfloat16))
    teacher = on_gpu(qkv(2, 4, 200, 64, seed=1, dtype=torch.bfloat16))
    mask = ragged_mask(2, 200, seed=2).cuda()
    results = {}
    for name, loss in ATTENTION.items():
        value_and_grads(loss, student, *teacher, mask, impl="triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            results[name] = value_and_grads(loss, student, *teacher, mask, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x).all() for values in results.values() for x in values)


def test_auto_takes_triton_after_its_check(monkeypatch):
    monkeypatch.setattr(dispatch, "PROVEN_GPUS", frozenset())
    tensors = on_gpu(qkv(2, 4, 200, 64, seed=0, dtype=torch.bfloat16)) * 2
    assert "triton (the fastest on cuda)" in bertkd.explain("attention_kl", *tensors)
    assert dispatch.resolve("relation_kl", "auto", tensors).impl == "triton"
