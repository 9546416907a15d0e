"""The native attention: values and gradients against float64, and what dropout keeps."""

import pytest
import torch
from attention_cases import qkv, ragged_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, LOW, extra_memory, machine, needs_native
from oracle import relative
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bertkd.ops.self_attention import self_attention

pytestmark = needs_native


def plain(q, k, v, mask, scale, kept=1.0, window=None):
    """The definition, with a map; ``kept`` multiplies it as dropout does."""
    at = torch.arange(q.shape[2])
    seen = (at[:, None] - at).abs() <= (q.shape[2] if window is None else window)
    if mask is not None:
        seen = seen & mask.bool()[:, None, None, :]
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min / 4)
    # A row without a key attends to nothing.
    return (torch.softmax(scores, -1) * kept @ v) * seen.any(-1, keepdim=True)


def inputs(batch, heads, length, width, seed, dtype=torch.float32, spread=1.0):
    """q, k, v and an upstream gradient, as they come out of models."""
    first = qkv(batch, heads, length, width, seed=seed, dtype=dtype, spread=spread)
    return [*first, *qkv(batch, heads, length, width, seed=seed + 1000, dtype=dtype)]


def value_and_gradients(attend, q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def rounding(q, k, v, grad, mask, scale, window):
    """What fp32 rounding of every number that is added may sum up to (a norm), for output and gradients.

    The gradient of a score is a difference of inner products with upstream gradients, which need not be small where
    it is: of a single key it is 0.
    """
    eps = torch.finfo(torch.float32).eps
    keys = torch.ones(q.shape[0], q.shape[2]) if mask is None else mask.double()
    # The map, as what it makes of the unit matrix.
    unit = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    p = plain(q, k, unit, keys, scale, window=window)
    of_scores = p * (grad.abs() @ v.abs().transpose(-1, -2)) * scale
    parts = p @ v.abs(), of_scores @ k.abs(), of_scores.mT @ q.abs(), p.mT @ grad.abs()
    return [eps * part.norm() for part in parts]


@settings(max_examples=100, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    threads=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    width=st.integers(1, 128),
    window=st.one_of(st.none(), st.integers(0, 20), st.integers(0, 150)),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.02, 0.5]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_definition(
    isa, threads, batch, heads, length, width, window, masked, scale, seed
):
    *tensors, grad = inputs(batch, heads, length, width, seed)
    mask = ragged_mask(batch, length, seed=seed, empty_row=seed % 3 == 0) if masked else None
    factor = width**-0.5 if scale is None else scale
    doubles = [x.double() for x in tensors]
    expected = value_and_gradients(
        lambda *x: plain(*x, mask, factor, window=window), *doubles, grad
    )
    with machine(isa, threads):
        actual = value_and_gradients(
            lambda *x: self_attention(*x, mask, scale=scale, window=window), *tensors, grad
        )
    floors = rounding(*doubles, grad.double(), mask, factor, window)
    for got, want, floor in zip(actual, expected, floors, strict=True):
        error = (got.double() - want).norm()
        assert error <= 1e-5 * want.norm() + 4 * floor, f"{error:.1e} off, floor {floor:.1e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_it_errs_no_more_than_pytorch(dtype, spread, isa):
    *tensors, grad = inputs(2, 3, 50, 16, seed=0, dtype=dtype, spread=spread)
    mask = ragged_mask(2, 50, seed=3)
    keys = mask.bool()[:, None, None, :]
    exact = value_and_gradients(
        lambda *x: plain(*x, mask, 0.25), *[x.double() for x in tensors], grad
    )
    theirs = value_and_gradients(
        lambda *x: F.scaled_dot_product_attention(*x, keys.expand(-1, -1, 50, -1)), *tensors, grad
    )
    with machine(isa):
        ours = value_and_gradients(lambda *x: self_attention(*x, mask), *tensors, grad)
    for got, same, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == same.dtype == dtype
        assert relative(got, want) <= 2 * relative(same, want) + 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_sequences_without_a_token_give_zero_and_pads_no_gradient(isa, poisoned):
    *tensors, grad = inputs(2, 2, 40, 4, seed=0)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    with machine(isa):
        for result in value_and_gradients(
            lambda *x: self_attention(*x, mask, dropout=0.3), *tensors, grad
        ):
            assert (result == 0).all()
        mask[0, 5:30] = True
        out, _, *of_keys = value_and_gradients(lambda *x: self_attention(*x, mask), *tensors, grad)
    assert (out[1] == 0).all()
    # The rows of pads attend, as in PyTorch; nothing attends to pads.
    assert (out[0, :, 0] != 0).all()
    for gradient in of_keys:
        assert (gradient[0, :, :5] == 0).all()
        assert (gradient[0, :, 5:30] != 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_a_key_in_their_window_are_zero(isa, poisoned):
    *tensors, grad = inputs(1, 2, 120, 8, seed=0)
    mask = torch.zeros(1, 120, dtype=torch.bool)
    mask[:, 70:90] = True
    with machine(isa):
        out, grad_q, *of_keys = value_and_gradients(
            lambda *x: self_attention(*x, mask, window=4), *tensors, grad
        )
    for result, first, last in ((out, 66, 94), (grad_q, 66, 94), *((x, 70, 90) for x in of_keys)):
        inside = torch.zeros(120, dtype=torch.bool)
        inside[first:last] = True
        assert torch.isfinite(result).all()
        assert ((result[0, 1] != 0).any(-1) <= inside).all()
        assert (result[0, 1, 71:89] != 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_keys_far_outside_of_the_window_are_not_visited(isa):
    """A product with their 0 would turn NaN into NaN."""
    *tensors, grad = inputs(1, 2, 300, 8, seed=0)
    with machine(isa):
        results = []
        for spoiled in (False, True):
            if spoiled:
                for x in (*tensors, grad):
                    x[:, :, :100] = float("nan")
            results.append(
                value_and_gradients(lambda *x: self_attention(*x, window=16), *tensors, grad)
            )
    for got, want in zip(*reversed(results), strict=True):
        assert torch.equal(got[:, :, 180:], want[:, :, 180:])


def kept_pairs(batch, heads, length, dropout, seed):
    """What dropout makes of a map of ones: values that are the unit matrix show the map."""
    q = torch.zeros(batch, heads, length, length)
    torch.manual_seed(seed)
    values = torch.eye(length).expand(batch, heads, length, length)
    return self_attention(q, q, values, dropout=dropout) * length


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.97])
def test_dropout_keeps_its_share_and_scales_it(dropout, isa):
    with machine(isa, 2):
        pairs = kept_pairs(3, 4, 90, dropout, seed=0)
    kept = pairs != 0
    torch.testing.assert_close(pairs[kept], torch.full_like(pairs[kept], 1 / (1 - dropout)))
    # Five standard deviations of a share of n independent draws; by rows and columns too.
    spread = 5 * (dropout * (1 - dropout)) ** 0.5
    for dims in ((0, 1, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3)):
        share = kept.double().mean(dims)
        assert (
            (share - (1 - dropout)).abs() < spread * (share.numel() / kept.numel()) ** 0.5
        ).all()


def test_dropout_is_independent_between_rows_heads_and_seeds():
    kept = (kept_pairs(2, 3, 96, 0.5, seed=1) != 0).double() - 0.5
    again = (kept_pairs(2, 3, 96, 0.5, seed=1) != 0).double() - 0.5
    other = (kept_pairs(2, 3, 96, 0.5, seed=2) != 0).double() - 0.5
    assert torch.equal(kept, again)
    rows = kept.reshape(-1, 96)
    for x, y in (
        (kept, other),
        (kept[0], kept[1]),
        (kept[:, 0], kept[:, 1]),
        (rows[:-1], rows[1:]),
        (rows[:, :-1], rows[:, 1:]),
        # One row's keys against the next row's, one place on: a counter that runs on would show.
        (rows[:-1, 1:], rows[1:, :-1]),
    ):
        correlation = 4 * (x * y).mean()
        assert abs(correlation) < 5 / x.numel() ** 0.5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dropout", [0.1, 0.6])
@pytest.mark.parametrize("window", [None, 9])
def test_the_backward_drops_what_the_forward_dropped(window, dropout, isa):
    *tensors, grad = inputs(2, 3, 64, 24, seed=4)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 50:] = False
    with machine(isa):
        # The pairs are numbered by the real keys.
        kept = torch.zeros(2, 3, 64, 64)
        pairs = kept_pairs(2, 3, 64, dropout, seed=9)
        kept[0], kept[1, :, :, :50] = pairs[0], pairs[1, :, :, :50]
        torch.manual_seed(9)
        actual = value_and_gradients(
            lambda *x: self_attention(*x, mask, dropout=dropout, window=window), *tensors, grad
        )
    doubles = [x.double() for x in tensors]
    expected = value_and_gradients(
        lambda *x: plain(*x, mask, 24**-0.5, kept.double(), window), *doubles, grad
    )
    for got, want in zip(actual, expected, strict=True):
        assert relative(got, want) < 1e-5


def test_checkpointing_drops_the_same_pairs_again():
    *tensors, grad = inputs(2, 3, 33, 8, seed=5)

    def attend(*x):
        return self_attention(*x, dropout=0.4)

    torch.manual_seed(3)
    straight = value_and_gradients(attend, *tensors, grad)
    torch.manual_seed(3)
    again = value_and_gradients(
        lambda *x: checkpoint(attend, *x, use_reentrant=False), *tensors, grad
    )
    for got, want in zip(again, straight, strict=True):
        assert torch.equal(got, want)


def test_results_do_not_depend_on_the_number_of_threads():
    *tensors, grad = inputs(2, 3, 130, 16, seed=6)
    results = []
    for threads in (1, 2, 5):
        with machine(ISAS[0], threads):
            torch.manual_seed(0)
            results.append(
                value_and_gradients(lambda *x: self_attention(*x, dropout=0.1), *tensors, grad)
            )
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


def test_any_layout_is_taken():
    *tensors, grad = inputs(2, 3, 21, 8, seed=7)
    expected = value_and_gradients(self_attention, *tensors, grad)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    wide = [F.pad(x, (3, 2))[..., 3:-2] for x in tensors]
    expanded = grad[:1, :1].expand_as(grad)
    for layout in (odd, wide):
        for got, want in zip(
            value_and_gradients(self_attention, *layout, grad), expected, strict=True
        ):
            assert torch.equal(got, want)
    got = value_and_gradients(self_attention, *tensors, expanded)
    want = value_and_gradients(self_attention, *tensors, expanded.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    # As the layer around it reads it: no copy.
    assert expected[0].transpose(1, 2).is_contiguous()


def test_what_hooks_on_saved_tensors_laid_out_anew_is_taken():
    *tensors, grad = inputs(2, 3, 40, 8, seed=8)
    expected = value_and_gradients(self_attention, *tensors, grad)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.transpose(-1, -2).contiguous(), lambda x: x.transpose(-1, -2)
    )
    with hooks:
        got = value_and_gradients(self_attention, *tensors, grad)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad, isa):
    q, k, v, _ = inputs(1, 2, 40, 8, seed=9)
    with machine(isa):
        for spoiled, rows in ((q, [7]), (k, range(40)), (v, range(40))):
            tensors = [x.clone() for x in (q, k, v)]
            for x, original in zip(tensors, (q, k, v), strict=True):
                if original is spoiled:
                    x[0, 1, 7, 3] = bad
            out = self_attention(*tensors)
            broken = ~torch.isfinite(out).all(-1)
            assert not broken[0, 0].any()
            assert broken[0, 1, list(rows)].all() or spoiled is k
            assert broken[0, 1].sum() <= len(rows)
            assert broken.any()


def test_empty_batches():
    q = torch.randn(0, 2, 5, 4, requires_grad=True)
    out = self_attention(q, q, q)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 5, 4)


def test_ops_pass_opcheck_and_compile():
    *tensors, _ = inputs(2, 2, 9, 8, seed=8)
    seed, mask = torch.tensor(5), torch.ones(2, 9, dtype=torch.bool)
    forward, backward = (
        torch.ops.bertkd.self_attention_fwd.default,
        torch.ops.bertkd.self_attention_bwd.default,
    )
    args = (*tensors, mask, seed, 0.3, 0.2, 4)
    torch.library.opcheck(forward, args)
    out, stats = forward(*args)
    torch.library.opcheck(backward, (out, *tensors, out, stats, mask, seed, 0.3, 0.2, 4))

    compiled = torch.compile(
        lambda *x: self_attention(*x, mask).square(), fullgraph=True, backend="aot_eager"
    )
    ours = value_and_gradients(compiled, *tensors, out)
    eager = value_and_gradients(lambda *x: self_attention(*x, mask).square(), *tensors, out)
    for got, want in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 4, 6)}, r"q and k must be .* one shape"),
        ({"v": torch.zeros(2, 3, 5, 4, dtype=torch.float16)}, "q and v must be .* dtype"),
        ({"mask": torch.ones(2, 4)}, r"mask must be \(B, L\) = \(2, 5\).*, got \(2, 4\)"),
        ({"mask": torch.ones(2, 5, device="meta")}, "mask must be .* on the CPU, got .* on meta"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"window": -1}, r"window \(tokens to either side\) must be at least 0, got -1"),
    ],
)
def test_bad_input_is_named(change, message):
    given = dict.fromkeys("qkv", torch.zeros(2, 3, 5, 4)) | change
    with pytest.raises(ValueError, match=message):
        self_attention(**given)


def test_other_dtypes_and_devices_are_sent_to_sdpa():
    for x in (torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 2, 2, device="meta")):
        with pytest.raises(ValueError, match=r"use F\.scaled_dot_product_attention"):
            self_attention(x, x, x)


STEP = """
from bertkd.ops.self_attention import self_attention

def step(q, k, v, _):
    self_attention(q, k, v, dropout=0.1).sum().backward()
"""


def test_memory_at_length_4096_is_a_tenth_of_one_map():
    extra, one_map = extra_memory(STEP), 12 * 4096 * 4096 * 4
    # The output, its gradient and three more are 12 MiB each.
    assert extra < one_map / 10, f"{extra / 2**20:.0f} MiB"
