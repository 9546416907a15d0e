"""Inputs for the attention ops: as they come out of models, i.e. (B, L, H, D) seen as (B, H, L, D)."""

import torch


def qkv(batch, heads, length, width, *, seed, dtype=torch.float32, spread=1.0):
    """Two tensors (B, H, L, D), transposed views."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, width)
    return [
        (torch.randn(shape, generator=generator) * spread).to(dtype).transpose(1, 2)
        for _ in range(2)
    ]


def ragged_mask(batch, length, *, seed, empty_row=False):
    """Right-padded, left-padded and holed sequences; optionally one without any real token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(batch):
        cut = int(torch.randint(0, length, (1,), generator=generator))
        if b % 3 == 0:
            mask[b, max(1, cut) :] = 0
        elif b % 3 == 1:
            mask[b, : min(cut, length - 1)] = 0
        else:
            mask[b] = (torch.rand(length, generator=generator) > 0.4).long()
            mask[b, cut] = 1
    if empty_row:
        mask[-1] = 0
    return mask


def value_and_grads(loss, student, *args, **options):
    """The loss, reduced against fixed weights, and its gradients with respect to the student's tensors."""
    student = [x.detach().requires_grad_() for x in student]
    value = loss(*student, *args, **options)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
    weights = weights.view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), student)]


def value_alone(loss, inputs, **options):
    """What ``value_and_grads`` gives first, where no gradient is wanted."""
    with torch.no_grad():
        return loss(*inputs, **options)


def exact(loss, student, *args, **options):
    """Eager results in float64, each with how far (a norm) it moves if every input moves by 2^-19 of itself.

    Where a difference cancels, as it can in a single element, arithmetic with 24 bits is no nearer than that.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [x.double() for x in (*student, *args)]

    def results(size):
        moved = [x * (1 + size * torch.randn(x.shape, generator=generator)) for x in inputs]
        moved_student, rest = moved[: len(student)], moved[len(student) :]
        return value_and_grads(loss, moved_student, *rest, impl="eager", **options)

    changes = [results(2**-19) for _ in range(3)]
    return [
        (want, max((x - want).norm() for x in others))
        for want, *others in zip(results(0), *changes, strict=True)
    ]
