"""How a Triton kernel is judged: against float64 eager, next to the error of eager in its own dtype."""

import importlib.util

import pytest
import torch
from attention_cases import value_alone, value_and_grads
from oracle import relative

# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 4e-3}


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(*shape, seed):
    """Row weights, about a third of them 0."""
    w = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(w < 0.3, torch.zeros(()), w)


def check(loss, student, *teacher, **options):
    """Value and gradients, and the value alone: at most twice eager's error in the same dtype, plus a tolerance.

    Args:
        loss: a function of ``bertkd.functional``'s form, over tensors alone.
        student: tensors that get a gradient.
        *teacher: tensors that get none.
        **options: handed on.
    """
    inputs = [*student, *teacher]
    double = [x.double() for x in inputs]
    n = len(student)
    exact = value_and_grads(loss, double[:n], *double[n:], impl="eager", **options)
    same = value_and_grads(loss, student, *teacher, impl="eager", **options)
    actual = value_and_grads(loss, student, *teacher, impl="triton", **options)
    tolerance = max(TOLERANCE[x.dtype] for x in inputs)
    # Where nobody wants a gradient other kernels run, or others of their branches.
    for results in (actual, same, exact):
        results.append(results[0])
    actual[-1] = value_alone(loss, inputs, impl="triton", **options)
    for got, eager, want in zip(actual, same, exact, strict=True):
        assert got.dtype == eager.dtype
        assert got.shape == eager.shape
        error, allowed = relative(got, want), 2 * relative(eager, want) + tolerance
        assert error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"


def break_kernel(monkeypatch, folder, kernels, launcher, old, new):
    """Replace ``old`` by ``new`` in a copy of a kernels module, and make its launcher run the copy.

    A kernel that is broken like this must fail the comparison; otherwise the comparison is worth nothing.
    """
    with open(kernels.__file__) as file:
        source = file.read()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    copy = folder / "broken.py"
    copy.write_text(source.replace(old, new).replace("from .", "from bertkd.kernels."))
    spec = importlib.util.spec_from_file_location("broken", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in vars(launcher).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(launcher, name, getattr(module, name, getattr(launcher, name)))


def fails(compare):
    """The comparison notices that something is wrong."""
    with pytest.raises(AssertionError, match="error"):
        compare()
