"""Who runs in a case: bertkd's implementations and what one would use instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bertkd.bench import flex, peers
from bertkd.bench.cases import Case
from bertkd.bench.ops import SPECS
from bertkd.bench.spec import OURS, Inputs, Loss
from bertkd.ops.implementations import implementation, unavailable

# eager: PyTorch as the paper's code writes it. products: its matrix products alone, a bound and no loss.
IMPLS = ("eager", "compile", "products", "flex", "sdpa", "textbrewer", "liger", "linearard", *OURS)
MODES = ("fwd", "fwd_bwd")

# Further contestants by name; tests put theirs in.
EXTRA: dict[str, Callable[[str], Loss]] = {}


def applies(impl: str, op: str, mode: str) -> bool:
    """Whether a contestant has the op at all; if not, there is nothing to report."""
    if impl == "products":
        return SPECS[op].bare is not None and mode == "fwd_bwd"
    if impl in OURS:
        return impl in SPECS[op].impls
    return peers.has(impl, op) if impl in peers.PEERS else True


def why_not(impl: str, case: Case, device: torch.device, mode: str) -> str | None:
    """Why a contestant cannot run a case, in one clause, or None if it can."""
    if impl in OURS:
        return _why_not_ours(impl, case, device)
    if impl == "compile":
        return flex.why_not_compiled(case, device, mode)
    return peers.why_not(impl, case, device, mode) if impl in peers.PEERS else None


def _why_not_ours(impl: str, case: Case, device: torch.device) -> str | None:
    reason = unavailable(impl) or wrong_device(impl, device)
    if reason is not None:
        return reason
    refusal = getattr(implementation(impl), "refusal", None)
    if refusal is None:
        return None
    # The smallest tensors of the case's widths; a refusal by length or batch comes when the contestant runs.
    inputs = SPECS[case.op].make(small(case), device, torch.Generator(device).manual_seed(0))
    return refusal(case.op, [*inputs.student, *inputs.teacher])


def wrong_device(impl: str, device: torch.device) -> str | None:
    """Why an implementation does not run on a device, or None if it does."""
    if impl in ("triton", "cuda") and device.type != "cuda":
        return "it needs a CUDA device"
    if impl == "native" and device.type != "cpu":
        return "it runs on CPUs only"
    return None


def small(case: Case) -> Case:
    """The case with one sequence or a few rows."""
    return replace(case, batch=min(case.batch, 1), rows=min(case.rows, 16), padding="full")


def loss_of(impl: str, op: str) -> Loss:
    """The function of a contestant that can run: inputs -> summed loss."""
    spec = SPECS[op]
    if impl in EXTRA:
        return EXTRA[impl](op)
    if impl in OURS:
        return partial(_ours, op, impl)
    if impl == "eager":
        return spec.eager
    if impl == "compile":
        return torch.compile(spec.eager, dynamic=False, fullgraph=True)
    return peers.loss_of(impl, op)


def _ours(op: str, impl: str, inputs: Inputs):
    return SPECS[op].call(inputs, impl)


def step(impl: str, op: str, loss: Loss | None, mode: str) -> Callable[[Inputs], list]:
    """One run of a contestant: inputs -> [loss, *gradients of the student's tensors]."""
    if impl == "products":
        bare = SPECS[op].bare
        assert bare is not None
        return lambda inputs: [torch.no_grad()(bare)(inputs)]
    assert loss is not None
    return partial(run_once, loss, mode)


def run_once(loss: Loss, mode: str, inputs: Inputs) -> list[torch.Tensor]:
    """``[loss]`` for "fwd", ``[loss, *gradients]`` for "fwd_bwd"."""
    if mode == "fwd":
        with torch.no_grad():
            return [loss(inputs)]
    student = [x.detach().requires_grad_() for x in inputs.student]
    value = loss(Inputs(student, inputs.teacher, inputs.mask))
    return [value.detach(), *torch.autograd.grad(value, student)]
