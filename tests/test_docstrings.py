"""The PyTorch expressions in the docstrings of the losses, run in float64, give what the losses give."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.nn.functional as F

from bertkd import functional

B, H, L, T = 2, 3, 5, 2.5


def tensor(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def student(seed, *shape):
    return tensor(seed, *shape).requires_grad_()


HEADS = [
    student(0, B, H, L, 4),
    student(1, B, H, L, 4),
    tensor(2, B, H, L, 6),
    tensor(3, B, H, L, 6),
]
SCALES = {"scale_s": 0.4, "scale_t": 0.3}
STATES = {"h_s": student(0, B, L, 4), "h_t": tensor(1, B, L, 6)}
PROJECTION = {"weight": student(2, 6, 4), "bias": student(3, 6)}
JOINED = {
    "h_s": [student(0, B, L, 4), student(1, B, L, 3)],
    "h_t": [tensor(2, B, L, 6), tensor(3, B, L, 2)],
    "weight": student(4, 7, 8),
    "bias": student(5, 7),
}
DECODERS = {
    "w_s": student(2, 9, 4),
    "w_t": tensor(3, 9, 6),
    "bias_s": student(4, 9),
    "bias_t": tensor(5, 9),
}

# Loss, its arguments, and other names in its expression.
CASES = {
    "relation_kl": (
        dict(zip(("a_s", "b_s", "a_t", "b_t"), HEADS, strict=True)) | SCALES | {"temperature": T},
        {},
    ),
    "attention_mse": (dict(zip(("q_s", "k_s", "q_t", "k_t"), HEADS, strict=True)) | SCALES, {}),
    "hidden_mse": (STATES | PROJECTION, {}),
    "hidden_combine_mse": (JOINED, {}),
    "hidden_cosine": ({"h_s": STATES["h_s"], "h_t": tensor(2, B, L, 4)}, {}),
    "softmax_kl": (
        {"z_s": student(0, B * L, 9), "z_t": tensor(1, B * L, 9), "temperature": T},
        {"T": T},
    ),
    "linear_kl": (STATES | DECODERS, {"softmax_kl": functional.softmax_kl}),
}


def expression(loss) -> list[str]:
    """The statements behind "Equivalent", or the docstring's first expression; the last one is the value."""
    text = inspect.getdoc(loss)
    if block := re.search(r"Equivalent[^`]*::\n\n(.*?)\n\n", text, re.S):
        return [line.strip() for line in block[1].splitlines()]
    return [
        " ".join(re.search(r"``(.*?)``", text[max(text.find("Equivalent"), 0) :], re.S)[1].split())
    ]


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_the_documented_expression_gives_value_and_gradients(name, impl):
    arguments, others = CASES[name]
    *steps, value = expression(getattr(functional, name))
    names = {**vars(torch), **vars(F), **arguments, **others}
    for step in steps:
        exec(step, names)
    want, got = eval(value, names), getattr(functional, name)(**arguments, impl=impl)
    every = [
        x for given in arguments.values() for x in (given if isinstance(given, list) else [given])
    ]
    trained = [x for x in every if isinstance(x, torch.Tensor) and x.requires_grad]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    for actual, right in zip(
        torch.autograd.grad(got, trained), torch.autograd.grad(want, trained), strict=True
    ):
        torch.testing.assert_close(actual, right)


def test_every_loss_with_an_expression_is_here():
    losses = (getattr(functional, name) for name in functional.__all__)
    assert {x.__name__ for x in losses if "Equivalent" in inspect.getdoc(x)} <= CASES.keys()


def test_a_strict_type_checker_knows_every_parameter():
    """pyright in strict mode refuses a function of which one has no type."""
    bare = [
        f"{name}({parameter.name})"
        for name in functional.__all__
        for parameter in inspect.signature(getattr(functional, name)).parameters.values()
        if parameter.annotation is parameter.empty
    ]
    assert not bare
