"""Find the compilers, and say in one clause what is missing and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from itertools import takewhile
from pathlib import Path

DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120")
# Below it there is neither cp.async nor a bf16 tensor-core product.
OLDEST_ARCH = 80
# Code for one GPU alone, and for a family of them; nvcc lists neither.
FIRST_WITH_SUFFIX = {"": OLDEST_ARCH, "a": 90, "f": 100}

_CXX_PROBE = (
    "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
)
_NVCC_PROBE = "#include <cuda_bf16.h>\n__global__ void probe() {}\n"


class Missing(Exception):
    """A part cannot be built here; the message is one clause with the remedy."""


class BadSetting(Exception):
    """An environment variable that steers the build has a value that makes no sense."""


def run(command: list[str]) -> str:
    """Standard output of a command; ``Missing`` with the end of its error output where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise Missing(f"{Path(command[0]).name} failed: {said.strip()}")
    return done.stdout


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def find_cxx() -> list[str]:
    """The C++ compiler's command: ``CXX``, or the first of g++, c++ and clang++ that is there."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            raise Missing(f"CXX={os.environ['CXX']} is not on the PATH")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Missing("no C++ compiler was found (install g++, or set CXX)")


def probe_cxx(cxx: list[str]) -> str:
    """Compile a few lines that need C++17, OpenMP and Python's headers; the compiler's version."""
    version = run([*cxx, "--version"]).splitlines()[0].strip()
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise Missing("Python's headers are missing (install python3-dev)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_CXX_PROBE)
        include = f"-I{sysconfig.get_path('include')}"
        output = str(Path(folder) / "probe.so")
        flags = ["-std=c++17", "-fopenmp", "-fPIC", "-shared", include]
        run([*cxx, *flags, str(source), "-o", output])
    return version


def find_pybind11() -> str:
    """pybind11's include folder: its own package, or the copy inside an installed torch."""
    spec = importlib.util.find_spec("pybind11")
    if spec is not None and spec.origin:
        return str(Path(spec.origin).parent / "include")
    # Machines without a network often have torch and nothing else. It is looked up, not imported.
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        include = Path(spec.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return str(include)
    raise Missing("pybind11 is not installed (pip install pybind11)")


def find_nvcc() -> Path:
    """nvcc: ``BERTKD_NVCC`` (a path, or ``pypi``), then ``CUDA_HOME``, the PATH, /usr/local/cuda."""
    wish, home = os.environ.get("BERTKD_NVCC"), os.environ.get("CUDA_HOME")
    if wish == "pypi":
        return _nvcc_from_pypi()
    if wish:
        if not Path(wish).is_file():
            raise Missing(f"BERTKD_NVCC={wish} is no file (give nvcc's path, or pypi)")
        return Path(wish)
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise Missing(f"CUDA_HOME={home} has no bin/nvcc (correct or unset it)")
        return nvcc
    for candidate in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    raise Missing("nvcc was not found (install the CUDA toolkit, or set BERTKD_NVCC=pypi)")


def _nvcc_from_pypi() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc")):
            return nvcc
    raise Missing(
        "BERTKD_NVCC=pypi, but the build environment has no nvidia-cuda-nvcc "
        "(leave --no-build-isolation out, or pip install 'nvidia-cuda-nvcc==13.0.*')"
    )


def find_cudart(nvcc: Path) -> Path:
    """The static CUDA runtime that belongs to ``nvcc``."""
    folders = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", "targets/sbsa-linux/lib")
    # The nvcc on the PATH may be a link, or a script that calls the real one elsewhere.
    homes = [nvcc.parent.parent, nvcc.resolve().parent.parent, _toolkit(nvcc)]
    for home in homes:
        for folder in folders:
            library = home / folder / "libcudart_static.a"
            if library.exists():
                return library
    raise Missing(f"libcudart_static.a was not found beside {nvcc} (install the CUDA runtime)")


def _toolkit(nvcc: Path) -> Path:
    """The folder that nvcc itself takes for the toolkit."""
    said = subprocess.run([str(nvcc), "-dryrun", "x.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    return Path(found[1]) if found else nvcc.parent.parent


def nvcc_host(cxx: list[str]) -> list[str]:
    """nvcc's arguments for the host compiler: of ``ccache g++ -m64`` the program is g++, with a flag."""
    words = list(takewhile(lambda word: not word.startswith("-"), cxx))
    return ["-ccbin", words[-1], *(f"-Xcompiler={flag}" for flag in cxx[len(words) :])]


def probe_nvcc(nvcc: Path, cxx: list[str]) -> tuple[str, list[int]]:
    """Compile an empty kernel with this host compiler; nvcc's version and the architectures it knows."""
    said = run([str(nvcc), "--version"])
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    known = re.findall(r"^compute_(\d+)$", run([str(nvcc), "--list-gpu-arch"]), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(_NVCC_PROBE)
        output = str(Path(folder) / "probe.o")
        run([str(nvcc), "-std=c++17", *nvcc_host(cxx), "-c", str(source), "-o", output])
    return version[1] if version else "unknown", [int(arch) for arch in known]


def choose_archs(known: list[int]) -> list[str]:
    """Architectures to build: ``BERTKD_CUDA_ARCHS`` (``native``: this machine's), or the defaults this nvcc knows."""
    asked = wish = os.environ.get("BERTKD_CUDA_ARCHS", "").strip()
    if not asked:
        return [arch for arch in DEFAULT_ARCHS if int(arch.rstrip("af")) in known]
    if asked == "native":
        asked = _native_archs()
    archs = [arch for arch in re.split(r"[;,\s]+", asked) if arch]
    if not archs:
        raise BadSetting(
            f"BERTKD_CUDA_ARCHS={wish}: gives no architecture. Write numbers like 80;90a;120."
        )
    for arch in archs:
        number = re.fullmatch(r"(\d{2,3})([af]?)", arch)
        problem = None
        if number is None:
            problem = "is no architecture"
        elif int(number[1]) < OLDEST_ARCH:
            problem = f"is too old: the kernels need {OLDEST_ARCH} or newer"
        elif int(number[1]) not in known:
            problem = "is not known to this nvcc"
        elif int(number[1]) < (first := FIRST_WITH_SUFFIX[number[2]]):
            problem = f"is no architecture: {number[2]!r} is for {first} and newer"
        if problem is not None:
            usable = ", ".join(str(arch) for arch in sorted(known) if arch >= OLDEST_ARCH)
            raise BadSetting(
                f"BERTKD_CUDA_ARCHS={asked}: {arch!r} {problem}. Write numbers like 80;90a;120; "
                f"this nvcc knows {usable}."
            )
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def _native_archs() -> str:
    """Architectures of this machine's GPUs, as the driver's tool tells them."""
    try:
        said = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except Missing as error:
        raise BadSetting(
            f"BERTKD_CUDA_ARCHS=native: {error}. Name the architectures, for example 80;90a."
        ) from error
    return ";".join(sorted(set(said.replace(".", "").split())))


def ptx_arch(archs: list[str]) -> str | None:
    """The newest architecture whose PTX newer GPUs can run; one with a suffix is bound to its GPU."""
    portable = [int(arch) for arch in archs if arch.isdigit()]
    return str(max(portable)) if portable else None
