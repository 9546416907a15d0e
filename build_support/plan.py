"""What will be built on this machine: decided once, before setuptools looks at anything."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from build_support import toolchain
from build_support.toolchain import BadSetting, Missing

MODES = ("auto", "cpu", "cuda", "none")


@dataclass
class Plan:
    """The parts to build, with what, and why a part is missing. What is here ends up in the record."""

    mode: str = "auto"
    parts: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    compiler: str | None = None
    isa: list[str] = field(default_factory=list)
    nvcc: str | None = None
    cuda_archs: list[str] = field(default_factory=list)
    cuda_ptx: str | None = None
    python: str = f"{sys.implementation.cache_tag}"
    machine: str = platform.machine()

    def __post_init__(self) -> None:
        self.cxx: list[str] = []
        self.pybind11 = ""
        self.nvcc_path = self.cudart = Path()

    def record(self) -> dict:
        """What ``bertkd info`` shows."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for the person who installs."""
        if self.mode == "none":
            return "bertkd: pure Python, as BERTKD_BUILD=none asks"
        built = " and ".join(self.parts) or "pure Python"
        reasons = "".join(f"; no {part}: {why}" for part, why in self.missing.items())
        return f"bertkd: {built}{reasons}"


def make_plan(root: Path) -> Plan:
    """Look at the environment and the machine.

    Raises:
        SystemExit: if ``BERTKD_BUILD=cpu`` or ``cuda`` asks for what cannot be built here, or a variable
            makes no sense.
    """
    plan = Plan(mode=os.environ.get("BERTKD_BUILD") or "auto")
    try:
        if plan.mode not in MODES:
            raise BadSetting(f"BERTKD_BUILD={plan.mode}: must be one of {', '.join(MODES)}.")
        if plan.mode == "none":
            plan.missing = dict.fromkeys(("cpu", "cuda"), "BERTKD_BUILD=none was set")
            return plan
        _plan_cpu(plan, root)
        _plan_cuda(plan, root)
    except BadSetting as error:
        raise SystemExit(f"error: {error}") from None
    needed = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}.get(plan.mode, ())
    for part in needed:
        if part not in plan.parts:
            raise SystemExit(
                f"error: BERTKD_BUILD={plan.mode}, but {plan.missing[part]}. "
                "BERTKD_BUILD=auto builds what can be built."
            )
    return plan


def _plan_cpu(plan: Plan, root: Path) -> None:
    try:
        if sys.platform != "linux":
            raise Missing(f"native code is built on Linux only, this is {sys.platform}")
        if not (root / "csrc" / "bindings.cpp").exists():
            raise Missing("this source tree has no csrc/bindings.cpp")
        plan.cxx = toolchain.find_cxx()
        plan.compiler = toolchain.probe_cxx(plan.cxx)
        plan.pybind11 = toolchain.find_pybind11()
    except Missing as error:
        plan.missing["cpu"] = str(error)
        return
    plan.parts.append("cpu")
    plan.isa = ["avx2", "avx512"] if toolchain.is_x86() else []


def _plan_cuda(plan: Plan, root: Path) -> None:
    try:
        if plan.mode == "cpu":
            raise Missing("BERTKD_BUILD=cpu was set")
        if "cpu" not in plan.parts:
            raise Missing(plan.missing["cpu"])
        if not list((root / "csrc" / "cuda").glob("*.cu")):
            raise Missing("this source tree has no csrc/cuda/*.cu")
        plan.nvcc_path = toolchain.find_nvcc()
        # Probed first: to find its library it is run again, and must be known to run.
        version, known = toolchain.probe_nvcc(plan.nvcc_path, plan.cxx)
        plan.cudart = toolchain.find_cudart(plan.nvcc_path)
    except Missing as error:
        plan.missing["cuda"] = str(error)
        return
    plan.cuda_archs = toolchain.choose_archs(known)
    if not plan.cuda_archs:
        plan.missing["cuda"] = f"nvcc {version} knows no architecture from 80 up"
        return
    plan.nvcc, plan.cuda_ptx = version, toolchain.ptx_arch(plan.cuda_archs)
    plan.parts.append("cuda")


def extension_suffix() -> str:
    return sysconfig.get_config_var("EXT_SUFFIX")
