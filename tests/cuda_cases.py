"""Cases for the CUDA launchers, run on a GPU or, emulated, on a CPU: the float64 reference is the truth."""

import torch
from attention_cases import qkv, ragged_mask
from oracle import relative

from bertkd import reference
from bertkd.ops import cuda

SCALES = {"scale_s": 0.3, "scale_t": 0.2}


def weights_of(rows, mask, *, seed, device):
    """Row weights (B, H, L): 0 at pads and at some real rows, else positive or negative."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, generator=generator) * 2 - 0.5
    weight[torch.rand(rows, generator=generator) < 0.2] = 0
    if mask is not None:
        weight = weight * mask[:, None].cpu()
    return weight.to(device)


def differentiate(definition, student, weight, *args, **options):
    """The definition's weighted sum and its gradients, by autograd."""
    student = [x.detach().requires_grad_() for x in student]
    loss = (definition(*student, *args, **options) * weight).sum()
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def assert_near(actual, eager, exact):
    """The error may be twice that of eager code in the same dtype."""
    for got, same, want in zip(actual, eager, exact, strict=True):
        assert got.dtype == same.dtype
        assert torch.isfinite(got).all()
        assert relative(got, want) <= 2 * relative(same, want) + 1e-5


def attention_inputs(shape, width_s, width_t, dtype, *, device="cpu", seed=0, masked=True):
    batch, heads, length = shape
    student = [x.to(device) for x in qkv(batch, heads, length, width_s, seed=seed, dtype=dtype)]
    teacher = [x.to(device) for x in qkv(batch, heads, length, width_t, seed=seed + 1, dtype=dtype)]
    mask = None
    if masked:
        # Right pads, left pads, holes, and a sequence of pads only.
        mask = ragged_mask(batch, length, seed=seed, empty_row=batch > 3).bool().to(device)
    return student, teacher, mask


def check_relation(shape, width_s, width_t, dtype, *, device="cpu", seed=0, masked=True):
    """Loss, gradients and rows of relation_kl against float64."""
    student, teacher, mask = attention_inputs(
        shape, width_s, width_t, dtype, device=device, seed=seed, masked=masked
    )
    weight = weights_of(shape, mask, seed=seed, device=device)
    args = (*teacher, mask)
    actual = cuda.relation_kl_fwd_bwd(weight, *student, *args, *SCALES.values())
    # Laid out as they come out of a model: no transposition on the way back.
    assert all(x.stride() == y.stride() for x, y in zip(actual[1:], student, strict=True))
    eager = differentiate(reference.relation_kl_rows, student, weight, *args, **SCALES)
    doubled = [x.double() for x in student]
    args = (*(x.double() for x in teacher), mask)
    exact = differentiate(reference.relation_kl_rows, doubled, weight.double(), *args, **SCALES)
    assert_near(actual, eager, exact)
    rows = cuda.relation_kl_rows(*student, *teacher, mask, *SCALES.values())
    want = reference.relation_kl_rows(*doubled, *args, **SCALES)
    torch.testing.assert_close(rows.double(), want, rtol=1e-4, atol=2e-6)


def self_relation_rows(x_s, x_t, mask, **scales):
    return reference.relation_kl_rows(x_s, x_s, x_t, x_t, mask, **scales)


def check_self_relation(shape, width_s, width_t, dtype, *, device="cpu", seed):
    """The same for self_relation_kl, whose gradient goes through both roles."""
    (x_s, _), (x_t, _), mask = attention_inputs(
        shape, width_s, width_t, dtype, device=device, seed=seed, masked=True
    )
    weight = weights_of(shape, mask, seed=seed, device=device)
    actual = cuda.self_relation_kl_fwd_bwd(weight, x_s, x_t, mask, *SCALES.values())
    eager = differentiate(self_relation_rows, [x_s], weight, x_t, mask, **SCALES)
    args = (weight.double(), x_t.double(), mask)
    exact = differentiate(self_relation_rows, [x_s.double()], *args, **SCALES)
    assert_near(actual, eager, exact)
    rows = cuda.self_relation_kl_rows(x_s, x_t, mask, *SCALES.values())
    want = self_relation_rows(x_s.double(), x_t.double(), mask, **SCALES)
    torch.testing.assert_close(rows.double(), want, rtol=1e-4, atol=2e-6)


def matrix(rows, width, dtype, *, device="cpu", seed=0, offset=0, gap=0):
    """(rows, width) whose first element is ``offset`` elements, and whose rows are ``gap`` elements apart."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((offset + rows * (width + gap),), float("nan"), dtype=dtype, device=device)
    view = whole[offset:].view(rows, width + gap)[:, :width]
    return view.copy_(torch.randn(rows, width, generator=generator) * 3)


def row_weights(rows, *, device="cpu"):
    return torch.linspace(-0.5, 1.5, rows).mul_(torch.arange(rows) % 4 != 1).to(device)


def check_softmax(rows, width, dtypes, *, device="cpu", offset=0, gap=0):
    """Loss, gradient and rows of softmax_kl against float64; rows of weight 0 hold NaN and are not read."""
    z_s = matrix(rows, width, dtypes[0], device=device, seed=0, offset=offset, gap=gap)
    z_t = matrix(rows, width, dtypes[1], device=device, seed=1, offset=offset, gap=gap)
    temperature = 1.5
    want = reference.softmax_kl_rows(z_s.double(), z_t.double(), temperature)
    actual = cuda.softmax_kl_rows(z_s, z_t, temperature)
    torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=2e-6)

    weight = row_weights(rows, device=device)
    pads = (weight == 0)[:, None]
    clean = [x.masked_fill(pads, 0.0) for x in (z_s, z_t)]
    z_s.masked_fill_(pads, float("nan"))
    z_t.masked_fill_(pads, float("nan"))
    actual = list(cuda.softmax_kl_fwd_bwd(weight, z_s, z_t, temperature))
    definition = reference.softmax_kl_rows
    eager = differentiate(definition, [clean[0]], weight, clean[1], temperature)
    doubled = [x.double() for x in clean]
    exact = differentiate(definition, [doubled[0]], weight.double(), doubled[1], temperature)
    # A student with gaps between its rows has a gradient without.
    eager[1] = torch.empty_like(z_s).copy_(eager[1])
    assert_near(actual, eager, exact)
    assert (actual[1][pads.expand_as(actual[1])] == 0).all()


def check_hidden(states, rows, width, dtypes, *, device="cpu", offset=0, gap=0):
    """Loss and gradients of hidden_mse against float64; rows of weight 0 hold NaN and are not read."""
    weight = row_weights(rows, device=device)
    pads = (weight == 0)[:, None]
    sides = [
        [
            matrix(rows, width, dtype, device=device, seed=2 * k + side, offset=offset, gap=gap)
            for k in range(states)
        ]
        for side, dtype in enumerate(dtypes)
    ]
    for x in (*sides[0], *sides[1]):
        x.masked_fill_(pads, float("nan"))
    loss, grads = cuda.hidden_mse_fwd_bwd(weight, *sides)
    alone = cuda.hidden_mse_sum(weight, *sides)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for k in range(states):
        x, y = (side[k].double().masked_fill(pads, 0.0) for side in sides)
        value, want = differentiate(reference.hidden_mse_rows, [x], weight.double(), y)
        total += value
        assert grads[k].dtype == dtypes[0]
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtypes[0]]
        torch.testing.assert_close(grads[k].double(), want, rtol=tolerance, atol=1e-6)
    for value in (loss, alone):
        torch.testing.assert_close(value.double(), total, rtol=1e-5, atol=1e-6)
