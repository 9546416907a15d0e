"""The CUDA sources compile for every architecture without a warning, and their kernels keep within a budget.

No GPU is needed: nvcc's own report and the machine code say how many registers a kernel takes, whether it spills, and
whether it uses the instructions that it was written for. ``pytest -s`` prints the table.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

# build_support is no part of the package: it lies beside it.
sys.path.insert(0, str(Path(__file__).parent.parent))
from build_support import compile as compiling
from build_support import toolchain

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills"]
STRICT_HOST = f"{compiling.NVCC_HOST_FLAGS},-Werror"
REGISTERS_OF_AN_SM = 65536
# Threads of a block at most, by kernel: what __launch_bounds__ promises the compiler.
THREADS = {
    "sum_kernel": 1024,
    "softmax_kl_kernel": 512,
    "hidden_mse_kernel": 256,
    "relation_kl_kernel": 512,
}
# Machine instructions that must be there, as patterns of SASS.
REQUIRED = {
    "softmax_kl.cu": [r"LDG\.E\.128", r"STG\.E\.128", r"MUFU\.EX2"],
    "hidden_mse.cu": [r"LDG\.E\.128", r"STG\.E\.128"],
    "relation_kl_fp16.cu": [r"HMMA\.16816\.F32", r"LDSM", r"LDGSTS", r"MUFU\.EX2"],
    "relation_kl_bf16.cu": [r"HMMA\.16816\.F32\.BF16", r"LDSM", r"LDGSTS", r"MUFU\.EX2"],
}
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def nvcc():
    try:
        found = toolchain.find_nvcc()
        _, known = toolchain.probe_nvcc(found, toolchain.find_cxx())
    except toolchain.Missing as error:
        pytest.skip(f"no nvcc: {error}")
    return found, [arch for arch in toolchain.DEFAULT_ARCHS if int(arch.rstrip("af")) in known]


def _cuobjdump():
    spec = importlib.util.find_spec("triton")
    path = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path and path.exists() else None


def _kernels(report):
    """(kernel, arch) -> registers, spilled bytes, stack, from ptxas -v."""
    found = {}
    for part in report.split("Compiling entry function")[1:]:
        name, arch = re.match(r" '(\S+)' for 'sm_(\w+)'", part).groups()
        kernel = next(known for known in THREADS if known in name)
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) \D+, (\d+) bytes spill", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[kernel, arch] = {
            "registers": registers,
            "spilled": stores + loads,
            "stack": stack,
        }
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_every_architecture_within_budget(source, nvcc, tmp_path, record_property):
    path, archs = nvcc
    output = tmp_path / f"{source}.o"
    command = [str(path), *compiling.NVCC_FLAGS, *STRICT, "-Xcompiler", STRICT_HOST]
    command += [f"-I{ROOT / 'csrc'}", *compiling.gencode(archs, toolchain.ptx_arch(archs))]
    command += ["-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report.lower(), report

    kernels = _kernels(report)
    for (kernel, arch), use in sorted(kernels.items()):
        line = f"{source:22} {kernel:20} sm_{arch:5} {use['registers']:4} registers"
        print(f"{line}, {use['spilled']} bytes spilled, {use['stack']} bytes of stack")
        record_property(f"{source} {kernel} sm_{arch}", str(use))
        assert use["spilled"] == 0
        assert use["stack"] == 0
        assert use["registers"] * THREADS[kernel] <= REGISTERS_OF_AN_SM
    if source != "relation_kl.cu":
        assert {arch for _, arch in kernels} == set(archs)
    _check_instructions(source, output, archs)


def _check_instructions(source, output, archs):
    tool = _cuobjdump()
    if tool is None or source not in REQUIRED:
        return
    sass = subprocess.run([str(tool), "-sass", str(output)], capture_output=True, text=True).stdout
    # Sections of PTX are listed too, and hold no machine code.
    sections = re.split(r"Fatbin (?:elf|ptx) code:", sass)[1:]
    found = [(re.search(r"arch = sm_(\w+)", x)[1], x) for x in sections if "Function :" in x]
    assert {arch for arch, _ in found} == set(archs)
    for arch, code in found:
        assert not re.search(r"\b(STL|LDL)\b", code), f"local memory on sm_{arch}"
        assert not re.search(r"\b(ATOM|ATOMG|RED)\b", code), f"atomics on sm_{arch}"
        for instruction in REQUIRED[source]:
            assert re.search(instruction, code), f"no {instruction} on sm_{arch}"


def test_every_kernel_has_its_budget():
    code = "".join(p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert set(re.findall(r"\b(\w+_kernel)\(const BERTKD_GRID_CONSTANT", code)) == set(THREADS)


def test_nothing_in_the_kernels_is_left_to_chance():
    """No float atomics, no fast-math: results are the same on every run and equal networks give 0."""
    for path in (ROOT / "csrc" / "cuda").iterdir():
        assert "atomicAdd" not in path.read_text()
    assert not any("fast" in flag for flag in compiling.NVCC_FLAGS)
