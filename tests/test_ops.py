"""The registered ops: schemas and fakes agree with what runs, and the losses survive torch.compile."""

import subprocess
import sys

import pytest
import torch
from attention_cases import qkv, ragged_mask
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import bertkd
from bertkd import functional
from bertkd.ops import verify
from bertkd.ops.implementations import implementation, unavailable
from bertkd.ops.schema import OPS, value_form
from bertkd.ops.tensors import float_tensors


def inputs(op):
    """Arguments of an op, without ``impl``; half-precision student so that dtypes are told apart."""
    student, teacher = qkv(2, 3, 10, 4, seed=0, dtype=torch.float16), qkv(2, 3, 10, 4, seed=1)
    mask, heads_weight = ragged_mask(2, 10, seed=2).bool(), torch.rand(2, 3, 10)
    rows, d_s, d_t = torch.rand(8), torch.randn(8, 4), torch.randn(8, 6)
    weight, bias = torch.randn(6, 4), torch.randn(6).half()
    attention = (*student, *teacher, mask, 0.5, 0.5)
    linear = (
        d_s,
        torch.randn(9, 4),
        torch.randn(9).half(),
        d_t,
        torch.randn(9, 6),
        None,
        2.0,
        True,
    )
    return {
        "relation_kl_rows": attention,
        "relation_kl_fwd_bwd": (heads_weight, *attention),
        "self_relation_kl_rows": (student[0], teacher[0], mask, 0.5, 0.5),
        "self_relation_kl_fwd_bwd": (heads_weight, student[0], teacher[0], mask, 0.5, 0.5),
        "attention_mse_rows": attention,
        "attention_mse_fwd_bwd": (heads_weight, *attention),
        "window_relation_kl_rows": (*attention, 3),
        "window_relation_kl_fwd_bwd": (heads_weight, *attention, 3),
        "window_attention_mse_rows": (*attention, 3),
        "window_attention_mse_fwd_bwd": (heads_weight, *attention, 3),
        "hidden_mse_fwd_bwd": (rows, [d_s, d_s.half()], [d_s, d_s]),
        "hidden_proj_mse_fwd_bwd": (rows, d_s, weight, bias, d_t),
        "hidden_combine_mse_fwd_bwd": (rows, [d_s], torch.randn(4, 12), bias[:4], [d_t, d_t]),
        "hidden_cosine_fwd_bwd": (rows, d_s.half(), d_s),
        "hidden_mse_sum": (rows, [d_s, d_s.half()], [d_s, d_s]),
        "hidden_proj_mse_sum": (rows, d_s, weight, bias, d_t),
        "hidden_combine_mse_sum": (rows, [d_s], torch.randn(4, 12), None, [d_t, d_t]),
        "hidden_cosine_sum": (rows, d_s.half(), d_s),
        "softmax_kl_rows": (d_s.half(), d_s, 2.0),
        "softmax_kl_fwd_bwd": (rows, d_s.half(), d_s, 2.0),
        "linear_kl_rows": (*linear, rows),
        "linear_kl_fwd_bwd": (rows, *linear),
    }[op]


@pytest.mark.parametrize("op", sorted(OPS))
def test_opcheck(op):
    torch.library.opcheck(OPS[op], (*inputs(op), "chunked"))


def test_opcheck_of_a_frozen_decoder():
    *args, decoder_grad = inputs("linear_kl_fwd_bwd")
    assert decoder_grad
    torch.library.opcheck(OPS["linear_kl_fwd_bwd"], (*args, False, "chunked"))


def losses():
    """Closures over fixed teachers: (loss of the student's tensors, the student's tensors)."""
    student, teacher = qkv(2, 3, 20, 4, seed=0), qkv(2, 3, 20, 4, seed=1)
    mask = ragged_mask(2, 20, seed=2)
    h_s, h_t, weight = torch.randn(2, 20, 4), torch.randn(2, 20, 6), torch.randn(6, 4)
    return {
        "attention_kl": (lambda q, k: functional.attention_kl(q, k, *teacher, mask), student),
        "attention_mse": (lambda q, k: functional.attention_mse(q, k, *teacher, mask), student),
        "value_relation_kl": (
            lambda v: functional.value_relation_kl(v, teacher[0], mask),
            student[:1],
        ),
        "attention_kl, window": (
            lambda q, k: functional.attention_kl(q, k, *teacher, mask, window=3),
            student,
        ),
        "attention_mse, window": (
            lambda q, k: functional.attention_mse(q, k, *teacher, mask, window=3),
            student,
        ),
        "rows": (
            lambda q, k: (
                functional.attention_kl(q, k, *teacher, mask, reduction="none").square().sum()
            ),
            student,
        ),
        "hidden_mse": (lambda h, w: functional.hidden_mse(h, h_t, mask, weight=w), [h_s, weight]),
        "hidden_states": (
            lambda a, b: functional.hidden_mse([a, b], [h_s, h_s], mask),
            [h_s * 2, h_s * 3],
        ),
        "hidden_combine_mse": (
            lambda h, w: functional.hidden_combine_mse([h], [h_t, h_s], w, mask=mask),
            [h_s * 2, torch.randn(4, 10)],
        ),
        "hidden_cosine": (lambda h: functional.hidden_cosine(h, torch.ones(2, 20, 4)), [h_s]),
        "softmax_kl": (lambda z: functional.softmax_kl(z, h_s, mask, temperature=2.0), [h_s * 2]),
        "linear_kl": (
            lambda h, w: functional.linear_kl(h, w, h_t, torch.ones(6, 6).tril(), mask),
            [h_s, weight],
        ),
        "linear_kl, frozen decoder": (
            lambda h: functional.linear_kl(h, weight, h_t, torch.ones(6, 6).tril(), mask),
            [h_s],
        ),
    }


@pytest.mark.parametrize("name", sorted(losses()))
def test_compiles_without_graph_breaks(name):
    loss, leaves = losses()[name]
    compiler_calls = []

    def compiler(graph, _):
        compiler_calls.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    results = []
    for function in (loss, compiled):
        moved = [x.detach().clone().requires_grad_() for x in leaves]
        value = function(*moved)
        results.append([value.detach(), *torch.autograd.grad(value, moved)])
    assert compiler_calls, "the compiled function never reached the compiler"
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", sorted(losses()))
def test_exported_for_its_value(name, trained):
    """A program of torch.export gives the value, also of tensors that are trained. It is for no training itself."""
    loss, leaves = losses()[name]
    if name == "value_relation_kl":
        # PyTorch expects no constant that is detached twice and used once, as the teacher's values are.
        loss, leaves = functional.value_relation_kl, [*leaves, leaves[0] * 2]
    leaves = tuple(x.detach().clone().requires_grad_(trained) for x in leaves)

    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return loss(*tensors)

    program = torch.export.export(Loss(), leaves)
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any(call.startswith("bertkd.") for call in calls)
    torch.testing.assert_close(program.module()(*leaves).detach(), loss(*leaves).detach())


def test_autocast_does_not_lower_the_precision():
    student, teacher = qkv(1, 2, 16, 4, seed=0), qkv(1, 2, 16, 4, seed=1)
    plain = functional.attention_kl(*student, *teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl in ("chunked", "eager"):
            loss = functional.attention_kl(*student, *teacher, impl=impl)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize("impl", ["chunked", "native", "triton"])
@pytest.mark.parametrize("op", sorted(verify.TENSORS))
def test_no_op_computes_in_half_precision_under_autocast(op, impl):
    tensors = [torch.float32] * verify.TENSORS[op]
    case = verify.random_case(op, tensors, verify.Sizes(length=17, vocabulary=40), "cpu")
    if impl != "chunked" and (
        unavailable(impl) or implementation(impl).refusal(op, float_tensors(case[1:]))
    ):
        pytest.skip(f"{impl} has no {op} here")
    for form in ("fwd_bwd", value_form(op)):
        args = case[1:] if form == "rows" else case
        if form == "rows" and op == "linear_kl":
            args = (*args, case[0])
        function = OPS[f"{op}_{form}"]
        plain = verify._results(function(*args, impl))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = verify._results(function(*args, impl))
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("op", sorted(verify.TENSORS))
def test_the_check_is_that_of_float32_whatever_surrounds_it(op, monkeypatch):
    """Autocast would run products in half precision, another default dtype would give weights in it, and a default
    device tensors that the CPU's generator cannot fill."""
    found = []
    inner = verify.compare
    monkeypatch.setattr(
        verify, "compare", lambda *a: found.append((a[2], inner(*a))) or found[-1][1]
    )
    kind = op, "fwd_bwd", "chunked", torch.device("cpu"), (torch.float32,) * verify.TENSORS[op]
    sizes = verify.Sizes(length=17, vocabulary=40)
    assert verify._verdict(*kind, sizes) is None
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert verify._verdict(*kind, sizes) is None
    torch.set_default_dtype(torch.float64)
    try:
        assert verify._verdict(*kind, sizes) is None
    finally:
        torch.set_default_dtype(torch.float32)
    (plain, wanted), *others = found
    for case, comparison in others:
        assert comparison.allowed == pytest.approx(wanted.allowed, rel=0.5)
        assert [x.dtype for x in verify._flat(case)] == [x.dtype for x in verify._flat(plain)]


@pytest.mark.parametrize("factor", [1, 3])
def test_a_graph_may_be_walked_twice_and_its_gradients_belong_to_the_caller(factor):
    student, teacher = qkv(2, 2, 16, 4, seed=0), qkv(2, 2, 16, 4, seed=1)
    q, k = (x.detach().requires_grad_() for x in student)
    loss = functional.attention_kl(q, k, *teacher) * factor
    first = torch.autograd.grad(loss, [q, k], retain_graph=True)
    kept = [x.clone() for x in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss * 2, [q, k])
    for once, twice in zip(kept, second, strict=True):
        torch.testing.assert_close(twice, once * 2)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [q, k])


def test_deterministic_bit_by_bit():
    student, teacher = qkv(4, 3, 70, 8, seed=0), qkv(4, 3, 70, 8, seed=1)

    def run():
        q, k = (x.detach().requires_grad_() for x in student)
        loss = functional.attention_kl(q, k, *teacher, ragged_mask(4, 70, seed=3))
        return [loss.detach(), *torch.autograd.grad(loss, [q, k])]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_import_pulls_in_neither_triton_nor_transformers():
    code = (
        "import sys, bertkd, bertkd.functional, bertkd.modules;"
        "print([m for m in ('triton', 'transformers', 'datasets', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_explain_says_what_runs_and_why(monkeypatch):
    x = torch.randn(1, 1, 2, 2)
    assert "eager (asked for as eager)" in bertkd.explain("attention_kl", impl="eager")
    monkeypatch.setenv("BERTKD_IMPL", "eager")
    assert "eager (asked for as eager)" in bertkd.explain("attention_kl", x)
    monkeypatch.delenv("BERTKD_IMPL")
    # Float64 is for checking gradients: no fast path computes in it, on any machine.
    explained = bertkd.explain("attention_kl", *[x.double()] * 4)
    assert explained.startswith(
        "attention_kl on cpu: chunked (the portable default; native is out: "
    )
    # As the loss itself is called.
    plain = bertkd.explain("attention_kl", *[x] * 4)
    for mask in (torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), None):
        assert bertkd.explain("attention_kl", *[x] * 4, mask) == plain
        assert bertkd.explain("attention_kl", *[[x, x]] * 4, mask) == plain
    with pytest.raises(ValueError, match="unknown impl"):
        bertkd.explain("attention_kl", x, impl="fastest")


def test_impl_that_cannot_run_is_refused():
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"unknown impl 'chunky'. Did you mean 'chunked'"):
        functional.attention_kl(x, x, x, x, impl="chunky")
    q, k = x.double(), x.double()
    for impl in ("native", "triton", "cuda"):
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run relation_kl: .*'chunked'"):
            functional.attention_kl(q, k, q, k, impl=impl)
