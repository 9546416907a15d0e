"""The parts of a build one by one: what a compiler says, which files are compiled and how, what is not looked for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

sys.path.insert(0, str(Path(__file__).parent.parent))
from build_support import backend, commands, plan, toolchain
from build_support import compile as compiling

OF_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="native code is built on Linux only"
)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("echo 'x.cpp:1: error: no omp.h' >&2; echo '1 problem.' >&2", "x.cpp:1: error: no omp.h"),
        ("echo one >&2; echo two >&2", "two"),
        ("echo 'said elsewhere'", "said elsewhere"),
        ("", "no output"),
    ],
)
def test_a_compiler_that_fails_is_quoted(says, told, tmp_path):
    tool = script(tmp_path / "c++", f"{says}\nexit 1")
    with pytest.raises(toolchain.Missing, match=rf"^c\+\+ failed: {told}$"):
        toolchain.run([str(tool)])


@pytest.fixture
def sources(tmp_path):
    """A tree whose path needs quoting, with a compiler that notes how it was called and writes what it should."""
    root = tmp_path / "it's a $tree: of sources"
    for name in ("bindings.cpp", "cpu/checks.cpp", "cpu/kernels_avx2.cpp"):
        path = root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    compiler = script(
        tmp_path / "c++",
        f'echo "$@" >> {tmp_path}/calls\nwhile [ $# -gt 1 ]; do shift; done\necho "$1" > "$1"',
    )
    made = plan.Plan(parts=["cpu"])
    made.cxx, made.pybind11 = [str(compiler)], str(root / "pybind11")
    return made, root, tmp_path / "calls"


@pytest.fixture(params=["ninja", "no ninja"])
def with_or_without_ninja(request, monkeypatch):
    found = compiling.shutil.which("ninja") if request.param == "ninja" else None
    if request.param == "ninja" and not found:
        pytest.skip("there is no ninja")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: found)


@pytest.mark.usefixtures("with_or_without_ninja")
def test_any_path_is_compiled_with_ninja_and_without(sources):
    made, root, calls = sources
    compiling.build(made, root, root / "build", root / "bertkd" / "_C.so")
    assert (root / "bertkd" / "_C.so").exists()
    # This plan has no instruction set, as on a processor that is no x86.
    assert len(calls.read_text().splitlines()) == 3
    assert "avx2" not in calls.read_text()


@pytest.mark.usefixtures("with_or_without_ninja")
def test_a_relative_compiler_is_one_from_here(sources, monkeypatch):
    made, root, _ = sources
    monkeypatch.chdir(Path(made.cxx[0]).parent)
    made.cxx = ["./c++"]
    compiling.build(made, root, root / "build", root / "bertkd" / "_C.so")
    assert (root / "bertkd" / "_C.so").exists()
    # ninja's own files stay with the objects.
    assert not list(Path.cwd().glob(".ninja*"))


def test_builds_of_other_parts_do_not_pass_for_this_one(sources):
    if not compiling.shutil.which("ninja"):
        pytest.skip("without ninja everything is linked every time")
    made, root, _ = sources
    output = root / "bertkd" / "_C.so"
    # The stand-in for a linker writes where it was told to write.
    for name in ("cpu", "cpu-cuda", "cpu"):
        compiling.build(made, root, root / name, output)
        assert f"/{name}/" in output.read_text()


def test_a_build_that_fails_leaves_the_record_of_what_is_there(tmp_path, monkeypatch):
    def fail(plan, root, folder, output):
        raise SystemExit("error: it did not compile")

    def succeed(plan, root, folder, output):
        output.parent.mkdir(parents=True)
        output.touch()

    def build_editable():
        made = setuptools.Distribution(
            {"packages": ["bertkd"], **commands.setup_arguments(["build"])}
        )
        made.get_command_obj("build_py").editable_mode = True
        made.get_command_obj("build_ext").inplace = True
        made.run_command("build_py")
        made.run_command("build_ext")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "make_plan", lambda root: plan.Plan(parts=["cpu", "cuda"]))
    record = tmp_path / "bertkd" / "_build_info.json"
    record.parent.mkdir()
    (record.parent / "__init__.py").touch()
    record.write_text("the last build's")
    monkeypatch.setattr(commands, "build_native", fail)
    with pytest.raises(SystemExit, match="did not compile"):
        build_editable()
    assert record.read_text() == "the last build's"
    monkeypatch.setattr(commands, "build_native", succeed)
    build_editable()
    assert json.loads(record.read_text())["parts"] == ["cpu", "cuda"]


def test_flags_of_an_instruction_set_and_of_strict_builds(sources, monkeypatch):
    made, root, _ = sources
    made.isa = ["avx2", "avx512"]
    steps = {x.source.stem: x for x in compiling.compile_steps(made, root, root / "build")}
    assert set(steps) == {"bindings", "checks", "kernels_avx2"}
    for name, step in steps.items():
        assert ("-mavx2" in step.command) == (name == "kernels_avx2")
        assert "-Werror" not in step.command
        assert "-ffast-math" not in step.command
    monkeypatch.setenv("BERTKD_WERROR", "1")
    for step in compiling.compile_steps(made, root, root / "build"):
        assert "-Werror" in step.command


def test_the_processor_is_asked_what_every_compiler_knows():
    """Clang 14 refuses other names, and ``pip install`` failed where it is the only compiler."""
    text = (Path(__file__).parent.parent / "csrc" / "cpu" / "dispatch.cpp").read_text()
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', text))
    assert {"avx2", "avx512f"} <= asked <= {"avx2", "fma", *OF_AVX512}


@pytest.mark.parametrize("source", ["dispatch", "kernels_avx2", "kernels_avx512"])
def test_clang_compiles(source):
    if not toolchain.is_x86():
        pytest.skip("only x86 has these instructions")
    try:
        toolchain.probe_cxx(["clang++"])
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    flags = [x for x in compiling.CXX_FLAGS if x != "-O3"]
    flags += compiling.ISA_FLAGS.get(source.removeprefix("kernels_"), [])
    file = Path(__file__).parent.parent / "csrc" / "cpu" / f"{source}.cpp"
    command = ["clang++", *flags, "-fsyntax-only", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compilers_at_once(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert compiling.jobs() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert compiling.jobs() == 3
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit, match=f"MAX_JOBS={wrong}: must be a positive"):
            compiling.jobs()


def test_the_cuda_runtime_is_found_beside_the_real_nvcc(tmp_path):
    library = tmp_path / "toolkit" / "lib64" / "libcudart_static.a"
    nvcc = script(tmp_path / "toolkit" / "bin" / "nvcc", "")
    with pytest.raises(toolchain.Missing, match=r"libcudart_static\.a was not found beside"):
        toolchain.find_cudart(nvcc)
    library.parent.mkdir()
    library.touch()
    assert toolchain.find_cudart(nvcc) == library
    link = tmp_path / "usr" / "bin" / "nvcc"
    link.parent.mkdir(parents=True)
    link.symlink_to(nvcc)
    assert toolchain.find_cudart(link).samefile(library)
    # A script that calls the one elsewhere, which says where it lives.
    says = f"echo '#$ TOP={tmp_path}/toolkit' >&2"
    assert toolchain.find_cudart(script(tmp_path / "opt" / "bin" / "nvcc", says)) == library


def test_an_nvcc_for_older_gpus_alone_is_no_nvcc(monkeypatch):
    monkeypatch.delenv("BERTKD_CUDA_ARCHS", raising=False)
    made = plan.Plan(parts=["cpu"])
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(toolchain, "find_cudart", lambda nvcc: Path("libcudart_static.a"))
    monkeypatch.setattr(toolchain, "probe_nvcc", lambda nvcc, cxx: ("10.2.89", [60, 70, 75]))
    plan._plan_cuda(made, Path(__file__).parent.parent)
    assert (made.parts, made.nvcc) == (["cpu"], None)
    assert made.missing == {"cuda": "nvcc 10.2.89 knows no architecture from 80 up"}


def test_architectures_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("BERTKD_CUDA_ARCHS", ";")
    with pytest.raises(toolchain.BadSetting, match="BERTKD_CUDA_ARCHS=;: gives no architecture"):
        toolchain.choose_archs([80, 90])
    # A driver that lists no GPU is no wish for all architectures.
    script(tmp_path / "nvidia-smi", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BERTKD_CUDA_ARCHS", "native")
    with pytest.raises(toolchain.BadSetting, match="=native: gives no architecture"):
        toolchain.choose_archs([80, 90])


def test_nothing_is_looked_for_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(commands, "make_plan", lambda root: pytest.fail("it looked"))
    assert commands.setup_arguments(["setup.py", "egg_info"]) == {}
    assert commands.setup_arguments(["setup.py", "sdist"]) == {}


def test_a_newer_setuptools_is_no_older_one():
    commands.check_setuptools("100.0.1")


def test_nvcc_is_fetched_for_a_build_that_must_have_cuda(monkeypatch):
    monkeypatch.setenv("BERTKD_NVCC", "pypi")
    # An empty one is as good as none, here and in the plan.
    wishes = {"auto": True, "": True, "cuda": True, "cpu": False, "none": False}
    for mode, wanted in wishes.items():
        monkeypatch.setenv("BERTKD_BUILD", mode)
        assert bool(backend._extra()) == wanted
