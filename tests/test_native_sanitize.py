"""csrc/cpu under the address and undefined-behaviour sanitizers, without Python, over the shapes of the tests."""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import zlib
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


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Where what several drivers are made of is compiled once."""
    # Workers of pytest-xdist have neighbouring base folders.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "sanitized"
    folder.mkdir(exist_ok=True)
    return folder


def build(driver, objects, folder, lanes=4, emulated=False):
    """A driver of this folder, with every source under the sanitizers."""
    sources = [
        ROOT / "tests" / f"{driver}.cpp",
        *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
    ]

    def flags_of(name):
        if name == "kernels_portable":
            return [f"-DBERTKD_PORTABLE_LANES={lanes}"]
        if emulated and name == "kernels_avx512":
            return EMULATED
        if emulated and name == "dispatch":
            return [HAS_AVX512]
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        return next((f for tail, f in ISA_FLAGS.items() if is_x86 and name.endswith(tail)), [])

    def compile_one(source):
        flags = [*FLAGS, *SANITIZERS, *flags_of(source.stem)]
        output = objects / f"{source.stem}-{zlib.crc32(' '.join(flags).encode()):08x}.o"
        with output.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():
                command = ["g++", *flags, f"-I{ROOT / 'csrc'}", "-c", source, "-o", output]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        return output

    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sources))
    program = folder / driver
    done = subprocess.run(
        ["g++", "-fopenmp", *SANITIZERS, *compiled, "-o", program], capture_output=True, text=True
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
def test_sanitizers_find_nothing(objects, tmp_path):
    assert "portable:" in run(build("native_sanitize", objects, tmp_path))


@pytest.mark.slow
def test_sanitizers_find_nothing_in_the_layout_of_avx512(objects, tmp_path):
    # 16 lanes run it on any machine.
    assert "portable:" in run(build("native_sanitize", objects, tmp_path, lanes=16), "portable")


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the file is empty on this processor"
)
def test_avx512_sources_are_right_where_no_processor_runs_them(objects, tmp_path):
    told = run(build("native_sanitize", objects, tmp_path, emulated=True), "avx512")
    assert re.search(r"avx512: \d+ cases", told), told


@pytest.mark.slow
def test_any_arguments_are_refused_or_kept_to(objects, tmp_path):
    told = run(build("native_fuzz", objects, tmp_path), "20000")
    found = re.search(r"(\d+) refused, (\d+) ran, (\d+) too large", told)
    # Neither side may starve, or the target has stopped testing it.
    assert all(int(count) > 1000 for count in found.groups()[:2]), told
