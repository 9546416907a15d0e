"""Other packages in the same race. A missing one is reported as such and is never an error."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bertkd.bench import flex, ops_networks
from bertkd.bench.cases import Case
from bertkd.bench.ops_attention import WINDOW, scores
from bertkd.bench.spec import Inputs, Loss

LINEARARD = "BERTKD_LINEARARD"

PEERS = ("flex", "sdpa", "textbrewer", "liger", "linearard")
# Cross-entropies: they differ from the KL by the teacher's entropy, so only their gradients are compared.
GRADIENT_ONLY = {("textbrewer", "relation_kl"), ("textbrewer", "softmax_kl")}


def has(impl: str, op: str) -> bool:
    """Whether a peer has a loss that computes ``op``."""
    return (impl, op) in _LOSSES


def why_not(impl: str, case: Case, device: torch.device, mode: str) -> str | None:
    """Why a peer that has the loss cannot run a case, or None if it can."""
    if impl == "flex":
        return flex.why_not(case, device, mode)
    if impl == "sdpa":
        return None
    if impl == "textbrewer":
        if case.padding != "full" and case.op == "relation_kl":
            return "its loss does not mask keys"
        return _missing("textbrewer.losses", "textbrewer")
    if impl == "liger":
        if case.op == "softmax_kl" and device.type != "cuda":
            return "its kernel needs a CUDA device"
        return _missing("liger_kernel", "liger-kernel")
    return _why_not_linearard(case, device)


def loss_of(impl: str, op: str) -> Loss:
    """The loss of a peer that can run ``op``."""
    return _LOSSES[impl, op]()


def _missing(module: str, package: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package may fail to import in any way with a newer torch
        if isinstance(error, ModuleNotFoundError):
            return f"not installed (pip install --no-deps {package})"
        return f"{package} does not import here: {type(error).__name__}"
    return None


def _why_not_linearard(case: Case, device: torch.device) -> str | None:
    folder = os.environ.get(LINEARARD)
    if not folder:
        return f"set {LINEARARD} to the folder of a checkout of gracefulning/LinearARD"
    if not (Path(folder) / "kernels" / "attention_KL" / "integration.py").is_file():
        return f"{LINEARARD}={folder} has no kernels/attention_KL/integration.py"
    if device.type != "cuda":
        return "its kernels need a CUDA device"
    if case.dtype not in ("float16", "bfloat16"):
        return "it takes float16 and bfloat16 only"
    if any(width & (width - 1) for width in (case.width_s, case.width_t)):
        return "its head widths are powers of two"
    return None


@cache
def _linearard(folder: str) -> Callable[..., Tensor]:
    # Under a name of its own: a folder called "kernels" on the import path breaks transformers.
    name = "bertkd_bench_linearard"
    package = types.ModuleType(name)
    package.__path__ = [str(Path(folder) / "kernels" / "attention_KL")]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.integration").attn_kl_align


def _linearard_loss() -> Loss:
    align = _linearard(os.environ[LINEARARD])

    def loss(inputs: Inputs) -> Tensor:
        a_s, b_s, a_t, b_t = (x.contiguous() for x in inputs.relation)
        mask = None if inputs.mask is None else inputs.mask.int()
        scales = {"sm_scale_s": a_s.shape[-1] ** -0.5, "sm_scale_t": a_t.shape[-1] ** -0.5}
        return align(a_s, b_s, a_t, b_t, attn_mask=mask, causal=False, **scales)

    return loss


def _textbrewer(name: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module("textbrewer.losses"), name)


def _textbrewer_attention(name: str) -> Loss:
    theirs = _textbrewer(name)

    def loss(inputs: Inputs) -> Tensor:
        s, t = (scores(side[0], side[1], None) for side in (inputs.student, inputs.teacher))
        mask = inputs.mask
        # Without a mask it zeroes every score below -1e-3, which is another loss.
        mask = s.new_ones(s.shape[0], s.shape[2]) if mask is None else mask.to(s.dtype)
        per_mean = theirs(s, t, mask)
        count = mask.sum() * s.shape[1] if "ce" in name else mask.sum(1).square().sum() * s.shape[1]
        return per_mean * count

    return loss


def _textbrewer_hidden() -> Loss:
    theirs = _textbrewer("hid_mse_loss")

    def loss(inputs: Inputs) -> Tensor:
        pairs = zip(inputs.student, inputs.teacher, strict=True)
        return torch.stack([theirs(s, t) * s.numel() for s, t in pairs]).sum()

    return loss


def _textbrewer_logits() -> Loss:
    theirs = _textbrewer("kd_ce_loss")
    return lambda inputs: theirs(inputs.student[0], inputs.teacher[0]) * inputs.student[0].shape[0]


def _liger_logits() -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    theirs = LigerKLDIVLoss(reduction="sum")

    def loss(inputs: Inputs) -> Tensor:
        z_s, z_t = inputs.student[0], inputs.teacher[0]
        return theirs(torch.log_softmax(z_s.float(), -1), torch.softmax(z_t.float(), -1))

    return loss


def _liger_decoders() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # beta=0 is KL(teacher || student); the hard loss is switched off.
    theirs = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0, compiled=True
    )

    def loss(inputs: Inputs) -> Tensor:
        rows = inputs.student[0].shape[0]
        labels = torch.zeros(rows, dtype=torch.long, device=inputs.student[0].device)
        return theirs(*inputs.student, *inputs.teacher, labels) * rows

    return loss


_LOSSES: dict[tuple[str, str], Callable[[], Loss]] = {
    ("flex", "relation_kl"): flex.loss,
    ("flex", "self_relation_kl"): flex.loss,
    ("flex", "window_relation_kl"): partial(flex.loss, WINDOW),
    ("sdpa", "self_attention"): ops_networks.sdpa,
    ("sdpa", "window_self_attention"): partial(ops_networks.sdpa, WINDOW),
    ("textbrewer", "relation_kl"): lambda: _textbrewer_attention("att_ce_loss"),
    ("textbrewer", "attention_mse"): lambda: _textbrewer_attention("att_mse_loss"),
    ("textbrewer", "hidden_mse"): _textbrewer_hidden,
    ("textbrewer", "softmax_kl"): _textbrewer_logits,
    ("liger", "softmax_kl"): _liger_logits,
    ("liger", "linear_kl"): _liger_decoders,
    ("linearard", "relation_kl"): _linearard_loss,
    ("linearard", "self_relation_kl"): _linearard_loss,
}
