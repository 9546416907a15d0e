"""Does an implementation give what the portable one gives? On random cases, value and gradients, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertkd.ops.implementations import implementation, warn_once

# Rounding the inputs of a matrix product to half precision and its result once costs this much, relative.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Floating-point tensors of an op without biases and with one state a side, in order.
TENSORS = {
    "relation_kl": 4,
    "self_relation_kl": 2,
    "attention_mse": 4,
    "window_relation_kl": 4,
    "window_attention_mse": 4,
    "hidden_mse": 2,
    "hidden_proj_mse": 3,
    "hidden_combine_mse": 3,
    "hidden_cosine": 2,
    "softmax_kl": 2,
    "linear_kl": 4,
}

WINDOWED = ("window_relation_kl", "window_attention_mse")
ATTENTION = ("relation_kl", "self_relation_kl", "attention_mse", *WINDOWED)

# One length for every form of the attention kernels (whole heads of up to 16, 32, 64, 128 tokens, tiles beyond), each
# with a ragged edge: checking every length that a data set has would never end.
CHECKED_LENGTHS, LONG = (13, 29, 61, 125), 261


class Sizes(NamedTuple):
    """What a random case is made of; every op uses the sizes that it has."""

    batch: int = 3
    heads: int = 2
    length: int = LONG
    widths: tuple[int, int] = (64, 64)  # student, teacher: head width, hidden width or classes
    vocabulary: int = 1000
    bias: bool = True  # whether projections and decoders have one
    masked: bool = True  # whether attention has a mask of keys; rows have weights anyway


class Comparison(NamedTuple):
    """Errors of the value and of the gradients, relative to float64, and what the portable code errs by."""

    op: str
    impl: str
    error: float
    portable_error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the error is finite and within twice the portable code's plus the dtype's rounding."""
        return self.error <= self.allowed


def random_case(
    op: str, dtypes: Sequence[torch.dtype], sizes: Sizes, device: torch.device | str, seed: int = 0
) -> list[Any]:
    """Arguments of ``<op>_fwd_bwd``: sequences of full and half length in turn; of three or more the last is all pads.

    Args:
        op: stem of the op, e.g. ``"relation_kl"``.
        dtypes: of the op's floating-point tensors in order, without biases, which get their weight's. Ops on lists of
            states take the first for the student's and the last for the teacher's.
        sizes: see ``Sizes``.
        device: where the tensors are made.
        seed: of the numbers.

    Raises:
        ValueError: for an op without a case.
    """
    generator = torch.Generator().manual_seed(seed)
    student, teacher = dtypes[0], dtypes[-1]
    width_s, width_t = sizes.widths[0], sizes.widths[-1]
    batch, heads, length = sizes.batch, sizes.heads, sizes.length

    def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
        # On the CPU, whatever PyTorch's default device: the numbers are to be the same everywhere.
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    def bias_of(dtype: torch.dtype, width: int) -> Tensor | None:
        return tensor(dtype, width) if sizes.bias else None

    def heads_of(dtype: torch.dtype, width: int) -> Tensor:
        # As they come out of a model: (B, L, H, D) seen as (B, H, L, D).
        return tensor(dtype, batch, length, heads, width).transpose(1, 2)

    lengths = [length if i % 2 == 0 else max(1, length // 2) for i in range(batch)]
    if batch > 2:
        lengths[-1] = 0
    positions = torch.arange(length, device="cpu")
    mask = torch.stack([positions < n for n in lengths])
    rows = mask[:, None].expand(-1, heads, -1) * torch.rand(
        batch, 1, length, generator=generator, dtype=torch.float32, device="cpu"
    )
    flat = rows[:, 0].reshape(-1).to(device)
    rows, keys = rows.to(device), mask.to(device) if sizes.masked else None
    count = flat.shape[0]
    scales = width_s**-0.5, width_t**-0.5
    if op in ("relation_kl", "attention_mse", *WINDOWED):
        widths = (width_s, width_s, width_t, width_t)
        sides = [heads_of(*x) for x in zip(dtypes, widths, strict=True)]
        # Wide enough to cross tiles, narrow enough to leave some out.
        window = [length // 4] if op in WINDOWED else []
        return [rows, *sides, keys, *scales, *window]
    if op == "self_relation_kl":
        return [rows, heads_of(student, width_s), heads_of(teacher, width_t), keys, *scales]
    if op == "hidden_mse":
        return [flat, *([tensor(dtype, count, width_s)] for dtype in (student, teacher))]
    if op == "hidden_cosine":
        return [flat, tensor(student, count, width_s), tensor(teacher, count, width_s)]
    if op == "softmax_kl":
        return [flat, tensor(student, count, width_s), tensor(teacher, count, width_s), 2.0]
    if op == "hidden_proj_mse":
        hidden, weight = tensor(student, count, width_s), tensor(dtypes[1], width_t, width_s)
        bias = bias_of(dtypes[1], width_t)
        return [flat, hidden, weight, bias, tensor(teacher, count, width_t)]
    if op == "hidden_combine_mse":
        # Mixed precision keeps weights in float32; among a list of states theirs is not told by its place.
        weights = torch.float32 if torch.float32 in dtypes else student
        weight = tensor(weights, width_s, 2 * width_t)
        states = [tensor(teacher, count, width_t) for _ in range(2)]
        return [flat, [tensor(student, count, width_s)], weight, bias_of(weights, width_s), states]
    if op == "linear_kl":
        decoders: list[Any] = []
        for of_hidden, of_weight, width in zip(
            dtypes[::2], dtypes[1::2], sizes.widths, strict=True
        ):
            scaled = tensor(of_weight, sizes.vocabulary, width).mul_(width**-0.5)
            bias = bias_of(of_weight, sizes.vocabulary)
            decoders += [tensor(of_hidden, count, width), scaled, bias]
        return [flat, *decoders, 2.0, True]
    raise ValueError(f"there is no random case for op {op!r}")


def compare(op: str, impl: str, case: Sequence[Any], form: str = "fwd_bwd") -> Comparison:
    """Run ``<op>_<form>`` of ``impl`` and of chunked on a case, and chunked in float64 as the truth.

    Args:
        op: stem of the op.
        impl: implementation to judge.
        case: what ``random_case`` gives.
        form: "fwd_bwd", or the op's ``value_form``.

    Returns:
        The largest relative error over the value and every gradient (norm of the error over the norm of
        what is right), and what is allowed.
    """
    name = f"{op}_{form}"
    case = case[1:] if form == "rows" else case
    doubled = [_double(arg) for arg in case]
    truth = _results(getattr(implementation("chunked"), name)(*doubled))
    portable = _results(getattr(implementation("chunked"), name)(*case))
    actual = _results(getattr(implementation(impl), name)(*case))
    error, portable_error = (_largest_error(result, truth) for result in (actual, portable))
    tolerance = max(TOLERANCE.get(x.dtype, 0.0) for x in _flat(case) if x.is_floating_point())
    return Comparison(op, impl, error, portable_error, 2 * portable_error + tolerance)


def disagreement(
    op: str, impl: str, tensors: Sequence[Tensor], form: str = "fwd_bwd", masked: bool = True
) -> str | None:
    """Why a form of ``impl`` may not be trusted with tensors like these, or None; checked once per process and kind.

    Of attention ops a call with a mask (``masked``) and one without are two kinds, with kernels of their own. Nothing
    is checked while a CUDA graph is being captured: that would be recorded.
    """
    device = tensors[0].device
    unbiased = [x for x in tensors if x.dim() > 1]
    # A bias makes another kernel of it; of linear_kl it is enough if one decoder has one.
    biased = len(unbiased) < len(tensors)
    sizes = _small_sizes(op, impl, unbiased)
    sizes = sizes._replace(bias=biased, masked=masked or op not in ATTENTION)
    kind = (op, form, impl, device, tuple(x.dtype for x in unbiased), sizes)
    if kind not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return f"{impl} has not been checked yet and cannot be inside a graph capture; warm up first"
        _verdicts[kind] = _verdict(*kind)
    return _verdicts[kind]


_verdicts: dict[tuple, str | None] = {}


def _small_sizes(op: str, impl: str, tensors: Sequence[Tensor]) -> Sizes:
    """A case of the tensors' own widths, of a size that takes the same form of the kernel, and not much else."""
    widths = tensors[0].shape[-1], tensors[-1].shape[-1]
    of_form = getattr(implementation(impl), "size_of_form", None)
    size = None if of_form is None else of_form(op, tensors)
    if tensors[0].dim() == 4:
        length = tensors[0].shape[2]
        known = next((n for n in CHECKED_LENGTHS if length <= n + 3), LONG)
        return Sizes(length=known if size is None else size, widths=widths)
    length = 33 if size is None else size // Sizes().batch + 1
    vocabulary = tensors[1].shape[0] if op == "linear_kl" else 1
    return Sizes(length=length, widths=widths, vocabulary=vocabulary)


def _verdict(
    op: str,
    form: str,
    impl: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    sizes: Sizes,
) -> str | None:
    try:
        # The caller's autocast would run the products of both in half precision.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            result = compare(op, impl, random_case(op, dtypes, sizes, device), form)
    except Exception as error:
        # Whatever a compiler or driver raises, the portable code still works.
        problem = f"its check raised {type(error).__name__}: {error}"
    else:
        if result.agrees:
            return None
        problem = f"its result is off by {result.error:.1e}, allowed were {result.allowed:.1e}"
    warn_once(f"bertkd does not use impl={impl!r} for {op} on {device}: {problem}.")
    return problem


def _double(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_double(x) for x in arg]
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _flat(values: Sequence[Any]) -> list[Tensor]:
    flat = [
        x for value in values for x in (value if isinstance(value, (list, tuple)) else (value,))
    ]
    return [x for x in flat if isinstance(x, Tensor)]


def _results(returned: Any) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else _flat(returned)


def _largest_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    errors = [relative_error(result, right) for result, right in zip(results, truth, strict=True)]
    # NaN compares as false with everything and would pass for small.
    return max(error if error == error else float("inf") for error in errors)


def relative_error(result: Tensor, right: Tensor) -> float:
    """Norm of the error over the norm of what is right, in float64; the error itself where that is 0."""
    right = right.double()
    error, size = (result.double() - right).norm().item(), right.norm().item()
    return error / size if size > 0 else error
