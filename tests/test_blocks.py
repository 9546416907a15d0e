"""Attention losses over several blocks in one call: the sum of the calls for each; masks are looked at once."""

import pytest
import torch
from attention_cases import qkv, ragged_mask, value_and_grads
from oracle import relative
from torch.utils._python_dispatch import TorchDispatchMode

from bertkd import functional
from bertkd.ops.autograd import _divided
from bertkd.ops.implementations import unavailable
from bertkd.ops.schema import OPS
from bertkd.ops.shared import found_once, shared_calls

BLOCKS, BATCH, LENGTH = 3, 3, 19
KL = functional.attention_kl
MSE = functional.attention_mse


def blocks(seed, width=8, dtype=torch.float32):
    """q of every block, and k of every block."""
    pairs = [qkv(BATCH, 4, LENGTH, width, seed=seed + i, dtype=dtype) for i in range(BLOCKS)]
    return [list(x) for x in zip(*pairs, strict=True)]


def of_all(loss, mask, options):
    def run(*student, teacher):
        q_s, k_s = student[:BLOCKS], student[BLOCKS:]
        return loss(q_s, k_s, *teacher, mask, **options)

    return run


def one_by_one(loss, mask, options):
    def run(*student, teacher):
        losses = [
            loss(student[i], student[BLOCKS + i], teacher[0][i], teacher[1][i], mask, **options)
            for i in range(BLOCKS)
        ]
        return torch.stack(losses).sum()

    return run


@pytest.mark.parametrize("impl", ["eager", "chunked", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (KL, {}),
        (KL, {"reduction": "sum", "temperature": 2.0, "t_squared": True}),
        (KL, {"relation_heads": 2, "count_pads": True}),
        (KL, {"row_weight": torch.linspace(0.0, 2.0, BATCH)}),
        (MSE, {}),
        (MSE, {"scale_s": 0.3, "count_pads": True}),
    ],
)
def test_is_the_sum_of_the_calls_for_each(loss, options, dtype, impl):
    if (reason := unavailable(impl)) is not None:
        pytest.skip(reason)
    options = {**options, "impl": impl}
    (q_s, k_s), teacher = blocks(0, 8, dtype), blocks(9, 6, dtype)
    mask = ragged_mask(BATCH, LENGTH, seed=1, empty_row=True)
    got = value_and_grads(of_all(loss, mask, options), [*q_s, *k_s], teacher=teacher)
    want = value_and_grads(one_by_one(loss, mask, options), [*q_s, *k_s], teacher=teacher)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) <= (1e-6 if dtype == torch.float32 or a.dim() == 0 else 1e-3)
    with torch.no_grad():
        value = of_all(loss, mask, options)(*q_s, *k_s, teacher=teacher)
    torch.testing.assert_close(value, got[0])


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_agrees_with_float64(impl):
    (q_s, k_s), teacher = blocks(0), blocks(9)
    mask = ragged_mask(BATCH, LENGTH, seed=1)
    double = [[x.double() for x in side] for side in teacher]
    exact = value_and_grads(
        one_by_one(KL, mask, {"impl": "eager"}), [x.double() for x in (*q_s, *k_s)], teacher=double
    )
    got = value_and_grads(of_all(KL, mask, {"impl": impl}), [*q_s, *k_s], teacher=teacher)
    for a, b in zip(got, exact, strict=True):
        assert relative(a, b) < 1e-5


def test_relations_of_tensors_with_themselves_take_the_op_that_has_one_gradient(monkeypatch):
    import bertkd.ops.chunked as chunked

    seen = []
    inner = chunked.self_relation_kl_fwd_bwd
    monkeypatch.setattr(
        chunked, "self_relation_kl_fwd_bwd", lambda *args: seen.append(1) or inner(*args)
    )
    (v_s, _), (v_t, _) = blocks(0), blocks(9)
    value, *grads = value_and_grads(
        lambda *v: functional.value_relation_kl(v, v_t, impl="chunked"), v_s
    )
    assert len(seen) == BLOCKS
    want = value_and_grads(
        lambda *v: sum(
            functional.value_relation_kl(a, b, impl="eager") for a, b in zip(v, v_t, strict=True)
        ),
        v_s,
    )
    for a, b in zip([value, *grads], want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_in_several_blocks_gets_the_sum_of_its_gradients():
    q, k = qkv(2, 2, 7, 4, seed=0)
    q_t, k_t = qkv(2, 2, 7, 4, seed=1)
    once = value_and_grads(lambda q, k: KL(q, k, q_t, k_t), [q, k])
    twice = value_and_grads(lambda q, k: KL([q, q], [k, k], [q_t, q_t], [k_t, k_t]), [q, k])
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("place", [0, 1])
def test_one_block_in_float16_is_enough_to_divide_in_float32(place):
    """With a loss scale that float16 needs, gradients of a mean that was taken in it would have lost their bits."""
    dtypes = [torch.float32, torch.float32]
    dtypes[place] = torch.float16
    pairs = [qkv(2, 2, 200, 8, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    teacher = [
        list(x) for x in zip(*(qkv(2, 2, 200, 8, seed=9 + i) for i in range(2)), strict=True)
    ]
    student = [x for pair in pairs for x in pair]

    small = torch.full((2,), 1e-3)

    def loss(q_0, k_0, q_1, k_1):
        value = KL([q_0, q_1], [k_0, k_1], *teacher, row_weight=small, impl="chunked")
        return value * 2.0**22

    exact = value_and_grads(loss, [x.double() for x in student])
    for got, want in zip(value_and_grads(loss, student), exact, strict=True):
        assert relative(got, want) < 1e-3


@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_compiled_without_graph_breaks(impl):
    """One tensor in several places, as a mask is, and a block that is matched twice."""
    (q_s, k_s), teacher = blocks(0), blocks(9)
    (q_s, k_s), teacher = [[*x, x[0]] for x in (q_s, k_s)], [[*x, x[0]] for x in teacher]
    mask = ragged_mask(BATCH, LENGTH, seed=1)

    def run(*student):
        return KL(student[:BLOCKS] + student[:1], student[BLOCKS:] + student[BLOCKS : BLOCKS + 1],
                  *teacher, mask, impl=impl)  # fmt: skip

    student = [*q_s[:BLOCKS], *k_s[:BLOCKS]]
    got = value_and_grads(torch.compile(run, fullgraph=True), student)
    for a, b in zip(got, value_and_grads(run, student), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tangent_in_any_block_is_refused():
    (q_s, k_s), teacher = blocks(0), blocks(9)
    with torch.autograd.forward_ad.dual_level():
        q_s[-1] = torch.autograd.forward_ad.make_dual(q_s[-1], torch.ones_like(q_s[-1]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            KL(q_s, k_s, *teacher, impl="chunked")


def test_no_gradient_where_only_some_blocks_want_one():
    (q_s, k_s), teacher = blocks(0), blocks(9)
    q_s[1].requires_grad_()
    KL(q_s, k_s, *teacher).backward()
    alone = q_s[1].detach().requires_grad_()
    KL(alone, k_s[1], teacher[0][1], teacher[1][1]).backward()
    torch.testing.assert_close(q_s[1].grad, alone.grad)
    assert q_s[0].grad is None


def test_six_blocks_take_few_launches(monkeypatch):
    """The host launches each, and on a fast GPU it is the host that a step waits for."""
    pytest.importorskip("triton")
    from bertkd.ops.triton import attention, config, relation_kl

    if (reason := unavailable("triton")) is not None:
        pytest.skip(reason)
    launched, others = [], []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel)
            return self.kernel[grid]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            views = any(output.alias_info is not None for output in function._schema.returns)
            makes = "empty" in function._schema.name
            if function.namespace == "aten" and not views and not makes:
                others.append(str(function))
            return result

    monkeypatch.setattr(config, "INTERPRETED_SHORT", 0)
    monkeypatch.setattr(attention, "sequence_extents", Counted(attention.sequence_extents))
    for name in ("relation_kl_rows_kernel", "relation_kl_keys_kernel"):
        monkeypatch.setattr(relation_kl, name, Counted(getattr(relation_kl, name)))
    (q_s, k_s), teacher = blocks(0), blocks(9)
    q_s = [x.requires_grad_() for x in q_s * 2]
    mask = ragged_mask(BATCH, LENGTH, seed=1)
    with Watch():
        KL(q_s, k_s * 2, *(x * 2 for x in teacher), mask, impl="triton")
    assert len(launched) == 1 + 2 * len(q_s)
    # Two casts, count, clamp, times heads, division; stack and sum. An op's own sum over shares is not seen here.
    assert len(others) <= 8, others


def test_extents_are_looked_at_once_for_all_blocks_and_never_kept_too_long(monkeypatch):
    pytest.importorskip("triton")
    from bertkd.ops.triton import attention

    if (reason := unavailable("triton")) is not None:
        pytest.skip(reason)
    made = []
    inner = attention._extents
    monkeypatch.setattr(attention, "_extents", lambda *args: made.append(1) or inner(*args))
    (q_s, k_s), teacher = blocks(0), blocks(9)
    mask = ragged_mask(BATCH, LENGTH, seed=1).bool()
    value_and_grads(of_all(KL, mask, {"impl": "triton"}), [*q_s, *k_s], teacher=teacher)
    assert len(made) == 1

    # Compiled code writes into memory that it has used before, and nobody notes that.
    few, all_ = torch.zeros(BATCH, 4, LENGTH), torch.ones(BATCH, 4, LENGTH)
    few[..., :2] = 1
    weight = few.clone()
    sides = [q_s[0], k_s[0], *(x[0] for x in teacher), mask, 0.25, 0.25, "triton"]
    for now in (few, all_, few):
        weight.data.copy_(now)
        found = OPS["relation_kl_fwd_bwd"](weight, *sides)
        for got, want in zip(found, OPS["relation_kl_fwd_bwd"](now, *sides), strict=True):
            assert torch.equal(got, want)


def test_what_calls_share_is_told_apart_and_forgotten():
    masks, weights = [torch.ones(2, 3), torch.ones(2, 3), None], [torch.ones(2), torch.ones(2)]
    pairs = [(mask, weight) for mask in masks for weight in (*weights, None)]
    made = []

    def make(mask, weight, x):
        made.append((mask, weight))
        return len(made)

    for _ in range(2):
        made.clear()
        with shared_calls():
            for _ in range(2):
                numbers = [found_once(make, *pair, None) for pair in pairs]
                assert numbers == list(range(1, len(pairs) + 1))
    with pytest.raises(RuntimeError), shared_calls():
        found_once(make, *pairs[0], None)
        raise RuntimeError
    before = len(made)
    for number in (1, 2):
        found_once(make, *pairs[0], None)
        assert len(made) == before + number


def test_a_block_in_float64_among_others_leaves_those_to_the_kernels(monkeypatch):
    """The weights of all blocks are in float64 then."""
    pytest.importorskip("triton")
    from bertkd.ops.triton import attention

    if (reason := unavailable("triton")) is not None:
        pytest.skip(reason)
    (q_s, k_s), teacher = blocks(0), blocks(9)
    seen, inner = [], attention._extents
    weight = torch.linspace(0.0, 2.0, BATCH * LENGTH, dtype=torch.float64).view(BATCH, 1, LENGTH)
    weight = weight.expand(-1, 4, -1)
    for name, count in (("relation_kl", 2), ("attention_mse", 2), ("self_relation_kl", 1)):
        sides = [x[0] for x in (q_s, k_s)[:count]] + [x[0] for x in teacher[:count]]
        sides += [None, 0.3, 0.3, "triton"]
        # A compiler takes one dtype only; the interpreter would not mind.
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_extents", lambda *args: seen.append(args[1]) or inner(*args))
            function = OPS[f"{name}_fwd_bwd"]
            got = function(weight, *sides)
        assert seen.pop().dtype == torch.float32
        for a, b in zip(got, function(weight.float(), *sides), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["chunked", "native", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mask_made_in_inference_mode(impl, reduction):
    if (reason := unavailable(impl)) is not None:
        pytest.skip(reason)
    (q_s, k_s), teacher = blocks(0), blocks(9)
    student, teacher = [q_s[0], k_s[0]], [x[0] for x in teacher]
    mask = ragged_mask(BATCH, LENGTH, seed=1).bool()
    for loss in (KL, MSE):
        options = {"impl": impl, "reduction": reduction}
        want = value_and_grads(loss, student, *teacher, mask, **options)
        with torch.inference_mode():
            other = mask.clone()
        got = value_and_grads(loss, student, *teacher, other, **options)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [KL, MSE])
def test_a_graph_takes_one_tensor_as_query_and_key(loss, reduction):
    torch._dynamo.reset()
    x, (q_t, k_t) = qkv(2, 4, LENGTH, 8, seed=0)[0], qkv(2, 4, LENGTH, 8, seed=1)

    def run(x, q_t, k_t):
        return loss(x, x, q_t, k_t, impl="chunked", reduction=reduction).sum()

    want = value_and_grads(run, [x], q_t, k_t)
    got = value_and_grads(torch.compile(run, fullgraph=True, backend="aot_eager"), [x], q_t, k_t)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_weights_of_a_mean_stay_one_head_for_all():
    """Who reads them looks at one head then."""
    weight = torch.rand(2, 1, 5).expand(2, 4, 5)
    divided = _divided(weight, torch.tensor(3.0))
    assert divided.stride(1) == 0
    assert torch.equal(divided, weight / 3.0)
