"""What the tests of the Triton attention kernels share: exact results, comparison, and kernels broken on purpose."""

import importlib.util
import sys
from pathlib import Path

import torch
from oracle import relative

from bertkd import kernels

KERNELS = Path(next(iter(kernels.__path__)))


def weighted(rows, weight, student, teacher, mask, scales, dtype=None):
    """Rows, weighted sum, and its gradients by autograd of a definition ``rows``; ``student`` tensors may be repeated.

    Args:
        rows: function of (a_s, b_s, a_t, b_t, mask), or of one tensor a side.
        dtype: what the tensors are cast to first; None leaves them.
    """
    student = [x.detach().to(dtype or x.dtype).requires_grad_() for x in student]
    teacher = [x.detach().to(dtype or x.dtype) for x in teacher]
    sides = [*student, *teacher] if len(student) == 2 else [student[0]] * 2 + [teacher[0]] * 2
    value = rows(*sides, mask, scale_s=scales[0], scale_t=scales[1])
    loss = (value * weight.to(value.dtype)).sum()
    return [value.detach(), loss.detach(), *torch.autograd.grad(loss, student)]


def worst(actual, eager, exact):
    """Largest excess of an error over twice eager's: at most 0 is right. Errors are relative, with a floor."""
    floor = {torch.float32: 2e-6, torch.float16: 5e-5, torch.bfloat16: 4e-3}
    excess = []
    for got, same, want in zip(actual, eager, exact, strict=True):
        assert got.dtype == same.dtype
        assert got.shape == want.shape
        if not torch.isfinite(got).all():
            return float("inf")
        size = want.double().norm().item()
        allowed = 2 * relative(same, want) * (size or 1.0) + floor[got.dtype] * max(size, 1e-3)
        excess.append(((got.double() - want).norm().item() - allowed) / max(size, 1e-3))
    return max(excess)


def broken(tmp_path, file, old, new):
    """The kernels' modules once more, with one line of ``file`` replaced: a namespace of the module ``file``."""
    package = tmp_path / "mutant"
    package.mkdir()
    for source in KERNELS.glob("*.py"):
        text = source.read_text()
        if source.stem == file:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
            text = text.replace(old, new)
        (package / source.name).write_text(text)
    name = f"mutant_{tmp_path.name.replace('-', '_')}"
    spec = importlib.util.spec_from_loader(name, None, is_package=True)
    module = importlib.util.module_from_spec(spec)
    module.__path__ = [str(package)]
    sys.modules[name] = module
    return importlib.import_module(f"{name}.{file}")
