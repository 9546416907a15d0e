"""csrc/cpu under the address and undefined-behaviour sanitizers, without Python, over the shapes of the tests."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Vectors wider than the processor's only warn that they cannot cross a compiled boundary, which none does.
FLAGS = ["-O1", "-g", "-std=c++17", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


# kernels_avx512.cpp, compiled for any processor with its instructions in plain C++, and chosen at run time.
EMULATED = ["-D__AVX512F__", f"-I{ROOT / 'tests' / 'avx512_emulated'}"]
HAS_AVX512 = "-D__builtin_cpu_supports(x)=((x)[3] == '5' || __builtin_cpu_supports(x))"


def build(driver, folder, *defines, emulated=False):
    """A driver of this folder, with every source under the sanitizers."""
    sources = [
        ROOT / "tests" / f"{driver}.cpp",
        *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
    ]

    def compile_one(source):
        flags = next((f for tail, f in ISA_FLAGS.items() if source.stem.endswith(tail)), [])
        if platform.machine() not in ("x86_64", "AMD64"):
            flags = []
        if emulated and source.stem.endswith("_avx512"):
            flags = EMULATED
        if emulated and source.stem == "dispatch":
            flags = [HAS_AVX512]
        output = folder / f"{source.stem}.o"
        command = ["g++", *FLAGS, *SANITIZERS, *flags, *defines, f"-I{ROOT / 'csrc'}", "-c", source]
        done = subprocess.run([*command, "-o", output], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / driver
    done = subprocess.run(
        ["g++", "-fopenmp", *SANITIZERS, *objects, "-o", program], capture_output=True, text=True
    )
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip("this g++ has no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    return program


def run(*command):
    """What a driver prints."""
    # A leak check needs ptrace, which containers forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [4, 16])
def test_sanitizers_find_nothing(lanes, tmp_path):
    # 16 lanes run the memory layout of AVX-512 on any machine.
    program = build("native_sanitize", tmp_path, f"-DBERTKD_PORTABLE_LANES={lanes}")
    assert "portable:" in run(program)


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the file is empty on this processor"
)
def test_avx512_sources_are_right_where_no_processor_runs_them(tmp_path):
    told = run(build("native_sanitize", tmp_path, emulated=True))
    assert re.search(r"avx512: \d+ cases", told), told


@pytest.mark.slow
def test_any_arguments_are_refused_or_kept_to(tmp_path):
    told = run(build("native_fuzz", tmp_path), "20000")
    found = re.search(r"(\d+) refused, (\d+) ran, (\d+) too large", told)
    # Neither side may starve, or the target has stopped testing it.
    assert all(int(count) > 1000 for count in found.groups()[:2]), told
