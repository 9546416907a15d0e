"""The submodule ``bertkd._C.cuda``: whether it is there, and how tensors cross into it."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bertkd import _build


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    """The submodule, or why it is not there."""
    reason = _build.missing("cuda")
    if reason is not None:
        return None, f"bertkd's CUDA kernels are not built: {reason}"
    try:
        module = importlib.import_module("bertkd._C")
    except ImportError as error:
        return None, f"bertkd._C cannot be loaded: {error}"
    if not hasattr(module, "cuda"):
        return None, "bertkd._C was built without CUDA (reinstall bertkd)"
    return module.cuda, None


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why no CUDA kernel can run in this installation, or None."""
    module, reason = _load()
    if module is None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    runtime, driver = module.runtime_version(), module.driver_version()
    if driver // 1000 < runtime // 1000:
        return (
            f"it was built with CUDA {version(runtime)}, and the driver serves up to {version(driver)} "
            "(update the driver, or reinstall bertkd with an older nvcc)"
        )
    return None


def version(number: int) -> str:
    """CUDA's 13020 as "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def kernels() -> Any:
    """``bertkd._C.cuda``.

    Raises:
        RuntimeError: if it is not there, with the reason.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"impl='cuda' cannot run: {reason}. Use impl='auto' or 'chunked'.")
    return module


def stream(x: Tensor) -> int:
    """The current stream of the device of ``x``, as an address."""
    return torch.cuda.current_stream(x.device).cuda_stream


def workspace(like: Tensor, floats: int) -> Tensor:
    """Partial sums of a launch, from PyTorch's allocator: safe to free once the launch is queued on the stream."""
    return torch.empty(max(1, floats), dtype=torch.float32, device=like.device)


def launch(work: Tensor) -> tuple[int, int, int]:
    """Where to launch, and what with: stream, address and size of the workspace."""
    return stream(work), work.data_ptr(), work.numel()
