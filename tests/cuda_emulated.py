"""Builds the CUDA kernels for a CPU (see cuda_emulator.h), once for all test processes."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_support import toolchain

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-O1",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
]
# The kernels' pragmas are nvcc's; makecontext looks like longjmp to the compiler.
FLAGS += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-DBERTKD_EMULATE"]


def sources():
    ours = [ROOT / "csrc" / "bindings_cuda.cpp", ROOT / "tests" / "cuda_emulator.cpp"]
    return [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *ours]


def _fingerprint():
    files = [*sources(), ROOT / "csrc" / "bertkd.h", *sorted((ROOT / "tests").glob("cuda_*.h"))]
    files += sorted((ROOT / "csrc" / "cuda").glob("*.*h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def build(folder, flags=()):
    """The path of the emulated module, compiled into ``folder`` unless it is there.

    Raises:
        toolchain.Missing: if there is no compiler, or no pybind11.
    """
    cxx, pybind11 = toolchain.find_cxx(), toolchain.find_pybind11()
    toolchain.probe_cxx(cxx)
    folder = Path(folder) / _fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / "bertkd_emulated.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'tests'}"]
    includes += ["-isystem", pybind11, "-isystem", sysconfig.get_path("include")]

    def compile_one(source):
        output = folder / f"{source.name}.o"
        command = [*cxx, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(output)

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = list(pool.map(compile_one, sources()))
            partial = module.with_suffix(".partial")
            subprocess.run([*cxx, "-shared", *flags, *objects, "-o", str(partial)], check=True)
            partial.rename(module)
    return module


def load(path):
    spec = importlib.util.spec_from_file_location("bertkd_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
