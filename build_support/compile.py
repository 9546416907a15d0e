"""Compile and link ``bertkd._C``: the commands, and ninja (or a pool of workers) to run them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_support.plan import Plan
from build_support.toolchain import nvcc_host

# -ffast-math would fold the exponential's rounding trick away.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
NVCC_FLAGS = ["-O3", "-std=c++17"]
NVCC_HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
EXPORTS = "exports.map"


@dataclass
class Step:
    """One object file."""

    source: Path
    output: Path
    command: list[str]

    @property
    def depfile(self) -> Path:
        return self.output.with_suffix(".d")


def gencode(archs: list[str], ptx: str | None) -> list[str]:
    """nvcc's flags for machine code of each architecture and, behind it, PTX for newer ones."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return flags + ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])


def _isa_of(source: Path) -> str | None:
    return next((isa for isa in ISA_FLAGS if source.stem.endswith(f"_{isa}")), None)


def compile_steps(plan: Plan, root: Path, folder: Path) -> list[Step]:
    """A step for every source file of the plan's parts."""
    csrc = root / "csrc"
    includes = [f"-I{csrc}", "-isystem", plan.pybind11]
    includes += ["-isystem", sysconfig.get_path("include")]
    strict = os.environ.get("BERTKD_WERROR") == "1"
    defines = ["-DBERTKD_WITH_CUDA"] if "cuda" in plan.parts else []
    flags = [*CXX_FLAGS, *(["-Werror"] if strict else []), *defines, *includes]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))

    sources = [csrc / "bindings.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    if "cuda" in plan.parts:
        sources.append(csrc / "bindings_cuda.cpp")
    steps = []
    for source in sources:
        isa = _isa_of(source)
        if isa is not None and isa not in plan.isa:
            continue
        output = folder / f"{source.stem}.o"
        own = ISA_FLAGS[isa] if isa else []
        steps.append(Step(source, output, [*plan.cxx, *flags, *own]))
    if "cuda" in plan.parts:
        archs = gencode(plan.cuda_archs, plan.cuda_ptx)
        host = NVCC_HOST_FLAGS + (",-Werror" if strict else "")
        command = [str(plan.nvcc_path), *NVCC_FLAGS, *archs, *nvcc_host(plan.cxx)]
        command += ["-Xcompiler", host, *(["-Werror", "all-warnings"] if strict else [])]
        for source in sorted((csrc / "cuda").glob("*.cu")):
            steps.append(Step(source, folder / f"{source.stem}_cu.o", [*command, f"-I{csrc}"]))
    for step in steps:
        step.command += ["-MD", "-MF", str(step.depfile), "-c", str(step.source)]
        step.command += ["-o", str(step.output)]
    return steps


def link_command(plan: Plan, objects: list[Path], output: Path) -> list[str]:
    """Link a shared module that shows nothing but its init function and needs no CUDA library.

    The version script also hides what -fvisibility cannot: the standard library's templates, which would
    otherwise be shared with every other extension of the process.
    """
    command = [*plan.cxx, "-shared", "-fopenmp", *map(str, objects)]
    if "cuda" in plan.parts:
        command += [str(plan.cudart), "-ldl", "-lrt", "-lpthread"]
    command += [
        "-s",
        "-Wl,--exclude-libs,ALL",
        f"-Wl,--version-script={objects[0].parent / EXPORTS}",
    ]
    return [*command, *shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(output)]


def jobs() -> int:
    """Compilers to run at once: ``MAX_JOBS``, or one per core."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked and not (asked.isdigit() and int(asked) > 0):
        raise SystemExit(f"error: MAX_JOBS={asked}: must be a positive whole number.")
    return int(asked) if asked else len(os.sched_getaffinity(0))


def build(plan: Plan, root: Path, folder: Path, output: Path) -> None:
    """Compile what changed and link it to ``output``.

    Raises:
        SystemExit: where a compiler fails; it has said why above.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / EXPORTS).write_text("{ global: PyInit__C; local: *; };\n")
    steps = compile_steps(plan, root, folder)
    # Beside its objects: builds of other parts write to `output` too, and ninja would take theirs for this one's.
    module = folder / output.name
    link = link_command(plan, [step.output for step in steps], module)
    workers = jobs()
    try:
        if shutil.which("ninja"):
            _run_ninja(steps, link, folder, module, workers)
        else:
            _run_pool(steps, link, workers)
    except subprocess.CalledProcessError:
        raise SystemExit(
            "error: bertkd's native code did not compile (see above). BERTKD_BUILD=none installs without it"
            + (", BERTKD_BUILD=cpu without CUDA." if "cuda" in plan.parts else ".")
        ) from None
    shutil.copy(module, output)


def _run_ninja(
    steps: list[Step], link: list[str], folder: Path, output: Path, workers: int
) -> None:
    def quoted(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    # ninja stays where it is called, as relative paths in CXX, CXXFLAGS and BERTKD_NVCC are meant from there.
    lines = [f"builddir = {path(folder)}"]
    for index, step in enumerate(steps):
        lines += [f"rule c{index}", f"  command = {quoted(step.command)}"]
        lines += [f"  depfile = {path(step.depfile)}", "  deps = gcc"]
        lines += [f"build {path(step.output)}: c{index} {path(step.source)}"]
    objects = " ".join(path(step.output) for step in steps)
    lines += ["rule link", f"  command = {quoted(link)}", f"build {path(output)}: link {objects}"]
    file = folder / "build.ninja"
    file.write_text("\n".join([*lines, ""]))
    subprocess.run(["ninja", "-f", str(file), "-j", str(workers)], check=True)


def _run_pool(steps: list[Step], link: list[str], workers: int) -> None:
    """Without ninja (an offline machine that has only torch) everything is compiled every time."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda step: subprocess.run(step.command, check=True), steps))
    subprocess.run(link, check=True)
