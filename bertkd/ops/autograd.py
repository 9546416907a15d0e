"""Autograd around the ops: plain Functions, outside the registered ops (half the cost of ``register_autograd``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bertkd.ops.checks import HALVES
from bertkd.ops.implementations import unavailable
from bertkd.ops.rows import weighted
from bertkd.ops.schema import LEAVES_ROWS_OUT, OPS, value_form
from bertkd.ops.shared import shared_calls

Arg = Tensor | Sequence[Tensor] | float | None


def _pack(flat: Sequence[Any], groups: Sequence[int]) -> list[Any]:
    """Undo the flattening that ``autograd.Function`` needs: group n > 0 is a list of n, 0 a single value."""
    packed, at = [], 0
    for size in groups:
        packed.append(list(flat[at : at + size]) if size else flat[at])
        at += size or 1
    return packed


def _flatten(args: Sequence[Arg]) -> tuple[list[Any], tuple[int, ...]]:
    flat: list[Any] = []
    groups = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            flat.extend(arg)
            groups.append(len(arg))
        else:
            flat.append(arg)
            groups.append(0)
    return flat, tuple(groups)


def _scaled(grads: Sequence[Tensor | None], factor: Tensor, in_place: bool) -> list[Tensor | None]:
    """``grad * factor``, each rounded once: a loss scale of 65536 does not fit in float16."""
    done = _by_kernel(grads, factor) if in_place else ()
    scaled: list[Tensor | None] = []
    for place, grad in enumerate(grads):
        if grad is None or place in done:
            scaled.append(grad)
        elif grad.dtype in HALVES:
            scaled.append((grad.float() * factor).to(grad.dtype))
        else:
            scaled.append(grad.mul_(factor) if in_place else grad * factor)
    return scaled


def _by_kernel(grads: Sequence[Tensor | None], factor: Tensor) -> Sequence[int]:
    """Multiply in place what the Triton kernel can; returns the places of those gradients."""
    # A fake tensor says that it is on a GPU too, but has no memory that a kernel could read.
    if type(factor) is not Tensor or not factor.is_cuda or unavailable("triton") is not None:
        return ()
    from bertkd.ops.triton.scale import can_scale, is_right, scale_

    fit = {
        place: grad
        for place, grad in enumerate(grads)
        if grad is not None and can_scale(grad, factor) and is_right(grad.dtype, grad.device)
    }
    scale_(list(fit.values()), factor)
    return tuple(fit)


def _is_last_visit(upstream: Tensor) -> bool:
    """Whether the graph is freed after this backward, so that what it saved may be overwritten; not by a batch of
    upstream gradients, which vmap shows as one."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _is_one(factor: Tensor) -> bool:
    """Whether the factor is seen to be 1, which spares a multiplication; on a GPU looking would mean waiting."""
    return type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1


SECOND_ORDER = b"bertkd's fused losses have no second derivative. Use impl='eager' where you differentiate twice."


def first_order(backward):
    """Makes a gradient that is differentiated again an error.

    ``once_differentiable`` does so only where the upstream gradient requires one. A loss's own is 1 and does not, so a
    gradient penalty, or a Hessian, would silently come out as 0.
    """

    @wraps(backward)
    def run(ctx, *upstream):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        fail = torch._C._functions.DelayedError(SECOND_ORDER, len(grads))
        return fail(*[None if g is None else g.detach().requires_grad_() for g in grads])

    return run


def _refuse_transforms(op: str, flat: Sequence[Any]) -> None:
    """Forward-mode differentiation would silently give 0, the transforms of torch.func an error without advice."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{op}: the fused losses cannot be transformed by torch.func (grad, vmap, ...). Use impl='eager' there, or "
            "backward()."
        )
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in flat
    ):
        raise NotImplementedError(
            f"{op}: the fused losses have no forward-mode derivative. Use impl='eager' there."
        )


def _place(grads: Sequence[Any], wrt: Sequence[int], args: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of the op, in order, to the places of the differentiated arguments."""
    flat, _ = _flatten(grads)
    placed: list[Tensor | None] = [None] * len(args)
    for index, grad in zip(wrt, flat, strict=True):
        placed[index] = None if args[index] is None else grad
    return placed


def _wanted(ctx, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Without those of frozen tensors: an op that was told of them gives empty ones."""
    needs = ctx.needs_input_grad[-len(grads) :]
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class SumLoss(torch.autograd.Function):
    """Weighted sum of an op's rows, over one call or several; the gradients come from the same visits and wait for
    their factor."""

    @staticmethod
    def forward(ctx, op, impl, wrt, groups, row_weight, *args):
        losses: list[Tensor] = []
        placed: list[Tensor | None] = []
        size = sum(group or 1 for group in groups)
        with shared_calls() if len(args) > size else nullcontext():
            for start in range(0, len(args), size):
                call = args[start : start + size]
                loss, *grads = OPS[f"{op}_fwd_bwd"](row_weight, *_pack(call, groups), impl)
                losses.append(loss)
                placed += _place(grads, wrt, call)
        ctx.save_for_backward(*placed)
        return _total(losses)

    @staticmethod
    @first_order
    def backward(ctx, grad_loss):
        grads = _wanted(ctx, ctx.saved_tensors)
        # A gradient is as large as its tensor: a copy of each would cost memory, and time to fault it in.
        last = _is_last_visit(grad_loss)
        if last and _is_one(grad_loss):
            return None, None, None, None, None, *grads
        return None, None, None, None, None, *_scaled(grads, grad_loss, last)


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _rows(op: str, impl: str, args: Sequence[Arg], row_weight: Tensor) -> Tensor:
    """Every row of an op; where rows are expensive, those that do not count are left out and come out as 0."""
    counted = (row_weight,) if op in LEAVES_ROWS_OUT else ()
    return OPS[f"{op}_rows"](*args, *counted, impl)


def _can_be_saved(arg: Any) -> bool:
    """Autograd takes no tensors made in inference mode, such as a teacher's. Nobody can write to them any more, which
    is what saving them would watch for."""
    return isinstance(arg, Tensor) and not (
        not torch.compiler.is_compiling() and arg.is_inference()
    )


class RowLoss(torch.autograd.Function):
    """An op's rows; the backward is its one-visit form with the upstream gradient as weights."""

    @staticmethod
    def forward(ctx, op, impl, wrt, groups, row_weight, *args):
        ctx.op, ctx.impl, ctx.wrt, ctx.groups = op, impl, wrt, groups
        ctx.static = [None if _can_be_saved(arg) else arg for arg in args]
        ctx.save_for_backward(*[arg if _can_be_saved(arg) else None for arg in args])
        return _rows(op, impl, _pack(args, groups), row_weight)

    @staticmethod
    @first_order
    def backward(ctx, grad_rows):
        saved = ctx.saved_tensors
        args = [a if t is None else t for t, a in zip(saved, ctx.static, strict=True)]
        packed = _pack(args, ctx.groups)
        _, *grads = OPS[f"{ctx.op}_fwd_bwd"](grad_rows, *packed, ctx.impl)
        return None, None, None, None, None, *_wanted(ctx, _place(grads, ctx.wrt, args))


def _needs_grad(flat: Sequence[Any], wrt: Sequence[int]) -> bool:
    return torch.is_grad_enabled() and any(
        flat[i] is not None and flat[i].requires_grad for i in wrt
    )


def sum_loss(
    op: str,
    impl: str,
    row_weight: Tensor,
    args: Sequence[Arg],
    wrt: Sequence[int],
    divisor: Tensor | None = None,
) -> Tensor:
    """``sum(row_weight * rows) / divisor`` of an op, differentiable in the flattened arguments ``wrt``.

    Args:
        op: name without suffix, e.g. ``"relation_kl"``.
        impl: implementation to run.
        row_weight: weights of the rows, in the dtype of the sums.
        args: the op's arguments after ``row_weight``, before ``impl``.
        wrt: positions of the student's tensors in the flattened ``args``, in the order in which the op
            returns their gradients.
        divisor: of a mean, a 0-d tensor; 1 if None.
    """
    return total_loss(op, impl, row_weight, [args], wrt, divisor)


def total_loss(
    op: str,
    impl: str,
    row_weight: Tensor,
    calls: Sequence[Sequence[Arg]],
    wrt: Sequence[int],
    divisor: Tensor | None = None,
) -> Tensor:
    """The sum of ``sum_loss`` over several calls' arguments, with the same weights and divisor for all.

    Args:
        calls: the ``args`` of every call, grouped alike: lists of states are of one length.
    """
    flattened = [_flatten(args) for args in calls]
    flat, groups = [flat for flat, _ in flattened], flattened[0][1]
    for call in flat:
        _refuse_transforms(op, call)
    if divisor is not None and not any(
        call[i] is not None and call[i].dtype == torch.float16 for call in flat for i in wrt
    ):
        # In the weights it costs no pass over the gradients, and these are rounded once. Float16 has no
        # room for the gradients of a mean: there they are divided in float32, together with the loss scale.
        row_weight, divisor = _divided(row_weight, divisor), None
    if divisor is not None and op == "attention_mse":
        # Nor for sums over all keys of differences that have no bound: those are divided by the keys at once.
        keys = row_weight.shape[-1]
        row_weight, divisor = _divided(row_weight, keys), divisor / keys
    loss = _total_loss(op, impl, row_weight, flat, groups, wrt)
    return loss if divisor is None else loss / divisor


def _divided(weight: Tensor, divisor: Tensor | int) -> Tensor:
    """``weight / divisor``, still expanded where ``weight`` was: who reads it looks at one head for all."""
    once = weight
    for dim, (size, stride) in enumerate(zip(weight.shape, weight.stride(), strict=True)):
        if stride == 0 and size > 1:
            once = once.narrow(dim, 0, 1)
    return (once / divisor).expand(weight.shape)


def _without_twins(flat: list[Any]) -> list[Any]:
    """The arguments of a call, with a view in place of a tensor that occurs again: a graph takes no tensor twice."""
    if not torch.compiler.is_compiling():
        return flat
    seen: list[Tensor] = []
    apart = []
    for x in flat:
        if isinstance(x, Tensor):
            if any(x is other for other in seen):
                x = x.view_as(x)
            seen.append(x)
        apart.append(x)
    return apart


def _total_loss(op, impl, row_weight, calls, groups, wrt) -> Tensor:
    if len(calls) > 1 and torch.compiler.is_compiling():
        # In a graph, one call for all would save the host nothing, and what the calls share must not be traced.
        return _total([_total_loss(op, impl, row_weight, [call], groups, wrt) for call in calls])
    if any(_needs_grad(call, wrt) for call in calls):
        flat = _without_twins(list(chain.from_iterable(calls)))
        return SumLoss.apply(op, impl, tuple(wrt), groups, row_weight, *flat)
    with torch.no_grad():
        return _total([_value(op, impl, row_weight, call, groups) for call in calls])


def _value(op, impl, row_weight, flat, groups) -> Tensor:
    if value_form(op) == "rows":
        return weighted(_rows(op, impl, flat, row_weight), row_weight).sum()
    return OPS[f"{op}_sum"](row_weight, *_pack(flat, groups), impl)


def row_loss(
    op: str, impl: str, row_weight: Tensor, args: Sequence[Arg], wrt: Sequence[int]
) -> Tensor:
    """``row_weight * rows`` of an op, differentiable in ``wrt``; arguments as for ``sum_loss``."""
    flat, groups = _flatten(args)
    _refuse_transforms(op, flat)
    if _needs_grad(flat, wrt):
        flat = _without_twins(flat)
        return weighted(RowLoss.apply(op, impl, tuple(wrt), groups, row_weight, *flat), row_weight)
    with torch.no_grad():
        return weighted(_rows(op, impl, _pack(flat, groups), row_weight), row_weight)


def in_float32(weight: Tensor | None) -> Tensor | None:
    """A trained weight or bias in float16 as float32, whose gradient becomes float16 after a mean's division.

    Its gradient is a sum over all rows, for which float16 has no room before that (see ``sum_loss``).
    """
    if weight is None or weight.dtype != torch.float16 or not weight.requires_grad:
        return weight
    return weight.float()
