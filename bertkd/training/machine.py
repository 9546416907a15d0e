"""The machine a run trains on: device, mixed precision and processes, through Accelerate."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, parse_flag_from_env
from torch import Tensor, nn

from bertkd.errors import unknown_name
from bertkd.ops.checks import HALVES

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU")

logger = logging.getLogger(__name__)


def this_process() -> PartialState:
    """Which of a run's processes this is, and its device.

    Without a GPU, Accelerate leaves processes unconnected unless its first call says that they are to use the CPU.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    state = PartialState(cpu=on_cpu)
    if not joined and state.backend == "gloo":
        # A process that is refused, and ends at once, would bring down others that are still connecting to it.
        state.wait_for_everyone()
    return state


def check_alone(command: str) -> None:
    """Refuse to run ``command`` in several processes, which would clear away each other's files.

    Raises:
        ValueError: saying how many there are.
    """
    count = this_process().num_processes
    if count > 1:
        raise ValueError(
            f"`bertkd {command}` runs in one process, but was started in {count}; start it without torchrun or "
            "accelerate launch."
        )


def make_accelerator(
    precision: str = "fp32",
    log_with: str | Sequence[str] | None = None,
    logging_dir: Path | None = None,
) -> Accelerator:
    """An Accelerator for ``train``: its device, mixed precision, DDP and trackers.

    Args:
        precision: "fp32", "bf16" or "fp16" (GPUs only).
        log_with: a tracker of Accelerate's by name, several, or None. TensorBoard is left out with a
            warning where it is not installed; any other tracker must be.
        logging_dir: where trackers that write files put them.

    Raises:
        ValueError: an unknown precision or tracker, or fp16 without a GPU.
        ImportError: a tracker that is not installed.
    """
    this_process()
    if precision not in _PRECISION:
        raise unknown_name("precision", precision, _PRECISION)
    mixed_precision = _PRECISION[precision]
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != mixed_precision:
        # Accelerate fixes the precision once per process; stages may differ in theirs.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=_installed(log_with) or None,
        project_dir=logging_dir,
        # A stage that matches inner layers leaves the task head without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    check_accelerator(accelerator, precision)
    return accelerator


def check_machine(precision: str, log_with: str | Sequence[str] | None = None) -> None:
    """Refuse what :func:`make_accelerator` would refuse of its arguments; makes and writes nothing.

    Raises:
        ValueError, ImportError: as ``make_accelerator``.
    """
    _check_precision(precision, this_process().device.type)
    for name in _names(log_with):
        _is_installed(name)


def check_accelerator(accelerator: Accelerator, precision: str) -> None:
    """Refuse an Accelerator that cannot do what the stage asks for.

    Raises:
        ValueError: another mixed precision than the stage's, accumulation of its own, fp16 on a CPU, or
            a way of distributing other than one process or DDP.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "the accelerator was made with gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}, which would divide the gradient once more; "
            "leave it at 1 and give the stage accumulate"
        )
    if accelerator.mixed_precision != _PRECISION[precision]:
        raise ValueError(
            f"the stage's precision is {precision!r} but the accelerator was made with "
            f"mixed_precision={accelerator.mixed_precision!r}; make them agree"
        )
    _check_precision(precision, accelerator.device.type)
    if accelerator.distributed_type.name not in _SUPPORTED:
        raise ValueError(
            f"training runs in one process or with DDP, not with {accelerator.distributed_type.name}"
        )


@contextmanager
def trackers(accelerator: Accelerator, run: Mapping[str, Any], resumed: int) -> Iterator[None]:
    """Keep the trackers open; TensorBoard drops what a killed run wrote beyond step ``resumed``."""
    purge = {"tensorboard": {"purge_step": resumed + 1}}
    accelerator.init_trackers("bertkd", init_kwargs=purge)
    for tracker in accelerator.trackers:
        # TensorBoard would make a run of its own out of them.
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(dict(run))
    try:
        yield
    finally:
        # Not end_training(), which would take the process group from later stages too.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def check_module(module: nn.Module) -> None:
    """Refuse a bare model, whose forward takes no batch, and weights that could not learn.

    Raises:
        TypeError: saying what to wrap it in.
        ValueError: weights in half precision are to be trained.
    """
    if hasattr(module, "save_pretrained"):
        raise TypeError(
            f"module is a {type(module).__name__}; train Supervised(model) to learn from labels, or a "
            "Distiller to learn from a teacher"
        )
    half = [
        (name, str(weight.dtype).removeprefix("torch."))
        for name, weight in module.named_parameters()
        if weight.requires_grad and weight.dtype in HALVES
    ]
    if half:
        name, dtype = half[0]
        raise ValueError(
            f"{len(half)} weights are to be trained in half precision, {name} in {dtype}, where small "
            "updates are rounded away; call .float() on the model, and let the stage's precision make "
            "the forward fast"
        )


class LossOnly(nn.Module):
    """``module`` with an output of which only the loss carries a graph.

    DDP waits for a gradient of every weight that any output depends on; logits the loss does not
    use would have it wait for ever.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and detached: the loss and its terms by name."""
        output = self.module(batch)
        if not hasattr(output, "loss") or not hasattr(output, "terms"):
            raise TypeError(
                f"{type(self.module).__name__} gave a {type(output).__name__}; module(batch) must give an "
                "object with loss (a scalar) and terms (scalars by name)"
            )
        values = {name: value.detach() for name, value in output.terms.items()}
        return output.loss, values | {"loss": output.loss.detach()}


def _check_precision(precision: str, device: str) -> None:
    if precision == "fp16" and device == "cpu":
        raise ValueError("precision='fp16' needs a GPU; use 'bf16' or 'fp32' on a CPU")


def _installed(log_with: str | Sequence[str] | None) -> list[Any]:
    kept = [name for name in _names(log_with) if _is_installed(name)]
    if len(kept) < len(_names(log_with)):
        logger.warning("tensorboard is not installed; the history goes to history.jsonl only")
    return kept


def _names(log_with: str | Sequence[str] | None) -> list[Any]:
    return [log_with] if isinstance(log_with, str) else list(log_with or [])


def _is_installed(tracker: Any) -> bool:
    """Whether a tracker can be used, as one made by the caller always can; only TensorBoard may be missing."""
    if not isinstance(tracker, str) or tracker == "all":  # of those that are installed
        return True
    if tracker not in LoggerType.list():
        raise unknown_name("tracker", tracker, LoggerType.list())
    packages = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
    if any(importlib.util.find_spec(package) is not None for package in packages):
        return True
    if tracker == "tensorboard":
        return False
    raise ImportError(
        f"log_with={tracker!r}: the package {tracker!r} is not installed; install it, or name another "
        "tracker"
    )
