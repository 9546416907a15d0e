"""What a figure was measured on: device, versions, commit, clocks."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "textbrewer")


def find_device(name: str | None) -> torch.device:
    """The device of a name; without one the GPU if there is one.

    Raises:
        ValueError: it is neither "cpu" nor a CUDA device that is there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"there are {count}, counted from 0" if count else "no CUDA device is there"
        raise ValueError(f"device={name!r}: {found}. Use another one, or 'cpu'.")
    return device


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def slug_of(name: str) -> str:
    """The folder of the results of a device of this name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(device: torch.device) -> dict[str, Any]:
    """The columns of a row that say where and when it was measured."""
    import bertkd

    found = {name: version_of(name) for name in ("torch", "triton", "transformers")}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **found,
        "bertkd": bertkd.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Everything about the machine that may explain a figure, for ``environment.json``."""
    found = stamp(device)
    found["versions"] = {name: version_of(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    found["system"] = platform.platform()
    # Another allocator, or another setting of it, changes what large tensors cost on a CPU.
    found["allocator"] = {
        k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "LD_PRELOAD"))
    }
    found["cpu"] = {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": card.name,
            "memory_bytes": card.total_memory,
            "processors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
            "cuda": torch.version.cuda,
            "clocks": clocks(),
        }
    return found


def clocks() -> str:
    """Clocks, temperature and power of the GPU now, as nvidia-smi tells them; "" without it."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    return " | ".join(_output(command).splitlines())


def commit() -> str:
    """Short commit of the checkout this package runs from, "+" behind it if changed; "" elsewhere.

    ``BERTKD_COMMIT`` says it instead where a copy of a checkout lost its history.
    """
    told = os.environ.get("BERTKD_COMMIT")
    root = Path(__file__).resolve().parents[2]
    if told or not (root / ".git").exists():
        return told or ""
    git = ["git", "-C", str(root)]
    found = _output([*git, "rev-parse", "--short=10", "HEAD"]).strip()
    # Results are written by the run itself and change nothing of what is measured.
    changed = _output([*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]).strip()
    return found + "+" if found and changed else found


def version_of(package: str) -> str:
    """Version of an installed package, "" without it."""
    if package == "torch":
        return torch.__version__  # its metadata may leave out the build, such as +cu130
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
