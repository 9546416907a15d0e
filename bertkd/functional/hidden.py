"""Losses on hidden states: mean squared error (with and without projection) and cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertkd import reference
from bertkd.ops.autograd import in_float32, sum_loss
from bertkd.ops.checks import check_bias, check_options, check_tensors
from bertkd.ops.dispatch import requested
from bertkd.ops.rows import as_mask, row_weights

States = Tensor | Sequence[Tensor]


def hidden_mse(
    h_s: States,
    h_t: States,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Mean squared error of hidden states over real tokens and the width ("Hid-Seq", "Hid-CLS").

    Equivalent, without masks, to ``mse_loss(linear(h_s, weight, bias), h_t)``; for several states to the
    sum over them.

    Args:
        h_s: student (..., d_s), usually (B, L, d_s), or a sequence of such states of one shape.
        h_t: teacher (..., d_t), or as many states.
        mask: shape of the rows, e.g. (B, L), 1 = real token.
        weight: projection (d_t, d_s) of the student's states, as in ``nn.Linear``; needed if widths differ.
            One state per call takes one.
        bias: (d_t,), with ``weight`` only.
        row_weight, count_pads, reduction, impl: see the module; ``"none"`` gives every row's mean over the
            width, for one state.

    Returns:
        A 0-d tensor, or one value per row.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: Wang et al., ACL 2023; TinyBERT (Jiao et al., 2020), equation 8.
    """
    op = "hidden_mse"
    check_options(op, reduction)
    students, teachers = _states(op, h_s, h_t)
    if weight is None and bias is not None:
        raise ValueError(f"{op}: bias needs weight. Pass the projection's weight too.")
    if weight is not None:
        check_tensors(op, None, weight=weight, h_s=students[0])
    width_s, width_t = students[0].shape[-1], teachers[0].shape[-1]
    if weight is None and width_s != width_t:
        raise ValueError(
            f"{op}: h_s has width {width_s} and h_t {width_t}. Pass weight of shape ({width_t}, {width_s}), "
            "or use modules.HiddenMSE, which owns one."
        )
    if weight is not None and tuple(weight.shape) != (width_t, width_s):
        raise ValueError(
            f"{op}: weight must have shape (d_t, d_s) = ({width_t}, {width_s}), got {tuple(weight.shape)}."
        )
    check_bias(op, "bias", bias, width_t, students[0].device)
    if len(students) > 1 and (weight is not None or reduction == "none"):
        raise ValueError(
            f"{op}: weight and reduction='none' take one state per call, got {len(students)}. Call once per state."
        )
    weights, count = _rows(op, students, teachers, weight, mask, row_weight, count_pads)
    divisor = count * width_t if reduction == "mean" else None
    impl = requested(impl)
    # One row per token needs no tiles: without a reduction the definition serves every implementation.
    if impl == "eager" or reduction == "none":
        per_row = sum(
            reference.hidden_mse_rows(s, t, weight, bias)
            for s, t in zip(students, teachers, strict=True)
        )
        loss = per_row * weights
        if reduction == "none":
            return loss / width_t
        return loss.sum() if divisor is None else loss.sum() / divisor
    if weight is None:
        flat = [[x.reshape(-1, x.shape[-1]) for x in side] for side in (students, teachers)]
        return sum_loss(op, impl, weights.reshape(-1), flat, range(len(students)), divisor)
    weight, bias = in_float32(weight), in_float32(bias)
    args = (students[0].reshape(-1, width_s), weight, bias, teachers[0].reshape(-1, width_t))
    return sum_loss("hidden_proj_mse", impl, weights.reshape(-1), args, (0, 1, 2), divisor)


def hidden_combine_mse(
    h_s: Sequence[Tensor],
    h_t: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean squared error between all student states and one projection of all teacher states ("combine").

    Equivalent to ``mse_loss(cat(h_s, -1), linear(cat(h_t, -1), weight, bias))``; nothing is concatenated.
    The projection is on the teacher's side and is trained, as in the released code: it can lower the loss
    by moving the target, so do not use this term alone.

    Args:
        h_s: student states, (..., d_s) each.
        h_t: teacher states, (..., d_t) each.
        weight: (sum of d_s, sum of d_t); gets a gradient.
        bias: (sum of d_s,).
        mask, row_weight, count_pads, impl: see the module.

    Returns:
        A 0-d tensor.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: Wang et al., ACL 2023 (mapping "combine").
    """
    op = "hidden_combine_mse"
    students, teachers = list(h_s), [t.detach() for t in h_t]
    for name, states in (("h_s", students), ("h_t", teachers)):
        if not states:
            raise ValueError(f"{op}: {name} is empty. Pass at least one state.")
    check_tensors(op, None, weight=weight, **_named(students, teachers))
    shape = (sum(x.shape[-1] for x in students), sum(x.shape[-1] for x in teachers))
    if tuple(weight.shape) != shape:
        raise ValueError(f"{op}: weight must have shape {shape}, got {tuple(weight.shape)}.")
    check_bias(op, "bias", bias, shape[0], weight.device)
    weights, count = _rows(op, students, teachers, weight, mask, row_weight, count_pads)
    impl = requested(impl)
    if impl == "eager":
        target, source = (
            torch.cat([x.to(weights.dtype) for x in states], -1) for states in (students, teachers)
        )
        loss = reference.hidden_mse_rows(source, target, weight, bias)
        return (loss * weights).sum() / (count * shape[0])
    flat = [[x.reshape(-1, x.shape[-1]) for x in side] for side in (students, teachers)]
    args = (flat[0], in_float32(weight), in_float32(bias), flat[1])
    wrt = range(len(students) + 2)
    return sum_loss(op, impl, weights.reshape(-1), args, wrt, count * shape[0])


def hidden_cosine(
    h_s: Tensor,
    h_t: Tensor,
    mask: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    count_pads: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Mean of 1 - cos(h_s, h_t) over real tokens.

    Equivalent, without masks, to ``(1 - cosine_similarity(h_s, h_t, -1)).mean()``, except for students' vectors of a
    norm up to 1e-8: they have cosine 0 and no gradient (PyTorch's is up to 1e8, and NaN in float16).

    Args:
        h_s, h_t: (..., d), the same width on both sides.
        mask: shape of the rows, e.g. (B, L), 1 = real token.
        row_weight, count_pads, reduction, impl: see the module.

    Returns:
        A 0-d tensor, or one value per row.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: DistilBERT (Sanh et al., 2019).
    """
    op = "hidden_cosine"
    check_options(op, reduction)
    students, teachers = _states(op, h_s, h_t)
    if len(students) > 1:
        raise ValueError(
            f"{op}: takes one state per call, got {len(students)}. Call once per state."
        )
    width_s, width_t = students[0].shape[-1], teachers[0].shape[-1]
    if width_s != width_t:
        raise ValueError(
            f"{op}: h_s has width {width_s} and h_t {width_t}. Project one of them first."
        )
    weights, count = _rows(op, students, teachers, None, mask, row_weight, count_pads)
    impl = requested(impl)
    if impl == "eager" or reduction == "none":
        teacher = teachers[0]
        if not torch.compiler.is_compiling() and teacher.is_inference():
            # Autograd saves it, which it refuses to do with tensors made in inference mode.
            teacher = teacher.clone()
        loss = reference.hidden_cosine_rows(students[0], teacher) * weights
        if reduction == "none":
            return loss
        return loss.sum() / count if reduction == "mean" else loss.sum()
    args = [x[0].reshape(-1, width_s) for x in (students, teachers)]
    divisor = count if reduction == "mean" else None
    return sum_loss(op, impl, weights.reshape(-1), args, (0,), divisor)


def _states(op: str, h_s: States, h_t: States) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of states, teacher detached, all of a side of one shape."""
    students = [h_s] if isinstance(h_s, Tensor) else list(h_s)
    teachers = [h_t] if isinstance(h_t, Tensor) else list(h_t)
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"{op}: {len(students)} student states but {len(teachers)} teacher states; pass pairs."
        )
    check_tensors(op, None, **_named(students, teachers))
    for side in (students, teachers):
        # Compared, not collected in a set: that would pin the sizes while torch.compile keeps them symbolic.
        if any(x.shape != side[0].shape for x in side):
            shapes = ", ".join(str(tuple(x.shape)) for x in side)
            raise ValueError(f"{op}: the states of one call must have one shape, got {shapes}.")
    return students, [t.detach() for t in teachers]


def _named(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> dict[str, Tensor]:
    sides = (("h_s", students), ("h_t", teachers))
    return {f"{name}[{i}]": x for name, states in sides for i, x in enumerate(states)}


def _rows(
    op: str,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weight: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    count_pads: bool,
) -> tuple[Tensor, Tensor]:
    """Row weights and count of hidden-state losses."""
    rows = tuple(students[0].shape[:-1])
    for name, states in (("h_s", students), ("h_t", teachers)):
        for index, state in enumerate(states):
            if tuple(state.shape[:-1]) != rows:
                raise ValueError(
                    f"{op}: {name}[{index}] has rows {tuple(state.shape[:-1])}, expected {rows}: feed both "
                    "networks the same batch from the same tokenizer."
                )
    mask = as_mask(op, mask, students[0], rows)
    dtype = reference.compute_dtype(*students, *teachers, weight)
    counted = None if count_pads else mask
    return row_weights(op, rows, counted, row_weight, dtype=dtype, device=students[0].device)
