"""Every way of installing: isolated and not, with and without compilers, from a tree, an sdist and git."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

# build_support is no part of the package: it lies beside it.
sys.path.insert(0, str(Path(__file__).parent.parent))
from build_support import backend, plan, toolchain

ROOT = Path(__file__).parent.parent
SKIPPED = {".git", ".venv", "build", "dist", "runs", "__pycache__", ".hypothesis"}
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Optimisation is the compiler's business: where only the way of building is tested, it is left out.
QUICK = {"CXXFLAGS": "-O0"}
NO_INDEX = ("No matching distribution", "Could not find a version", "ConnectionError")

linux = pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only")


@pytest.fixture
def tree(tmp_path):
    """A clean copy of the sources: builds leave files behind, and other tests build too."""

    def ignored(folder, names):
        return [n for n in names if n in SKIPPED or n.endswith((".so", ".egg-info", "_info.json"))]

    copy = tmp_path / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def environment(**changes):
    """This process's environment without what steers a build, and with the changes."""
    steering = ("BERTKD_", "CUDA_", "CXX", "LDFLAGS", "PYTHONPATH", "MAX_JOBS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return kept | {"MAX_JOBS": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | changes


def without_nvcc(folder):
    """Environment of a machine without a CUDA toolkit: CUDA_HOME has the first word, and is empty."""
    paths = os.environ["PATH"].split(os.pathsep)
    paths = [path for path in paths if not (Path(path) / "nvcc").exists()]
    return {"CUDA_HOME": str(folder / "no_cuda"), "PATH": os.pathsep.join(paths)}


def without_compilers(folder):
    """A PATH on which there is nothing but git."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    if shutil.which("git"):
        (tools / "git").symlink_to(shutil.which("git"))
    return {"CUDA_HOME": str(folder / "no_cuda"), "PATH": str(tools)}


def pip(*arguments, python=sys.executable, **changes):
    """Run pip; skip where it cannot reach a package index, fail where it fails otherwise."""
    command = [str(python), "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**changes))
    output = done.stdout + done.stderr
    if done.returncode and any(sign in output for sign in NO_INDEX):
        pytest.skip("the build requirements cannot be fetched without a package index")
    assert done.returncode == 0, output
    return output


def build_wheel(source, folder, *arguments, **changes):
    out = folder / "wheels"
    output = pip("wheel", "-v", "--no-deps", "-w", out, *arguments, source, **changes)
    (wheel,) = out.glob("*.whl")
    return wheel, output


def processor_seconds():
    """What the processes started and waited for have used so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_wheel(wheel):
    """Names in the wheel, and the build's record; what every wheel has is checked."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"bertkd"}
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= {Path(name).name for name in names if name.startswith("bertkd/kernels/")}
    assert "bertkd/kernels/__init__.py" not in names
    assert "bertkd/py.typed" in names
    assert any(re.fullmatch(r"bertkd/recipes/.*\.yaml", name) for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".o", ".pyc"))]
    return names, json.loads(archive.read("bertkd/_build_info.json"))


def check_library(module):
    """It needs nothing of torch, CUDA or Python, and shows nothing but its entry."""
    needed = needed_libraries(module)
    assert not re.search(r"torch|cuda|python|not found", needed), needed
    if shutil.which("nm"):
        command = ["nm", "-D", "--defined-only", str(module)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert [line.split()[-1] for line in shown.splitlines()] == ["PyInit__C"]


def needed_libraries(module):
    done = subprocess.run(["ldd", str(module)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs_compiler():
    try:
        toolchain.probe_cxx(toolchain.find_cxx())
        toolchain.find_pybind11()
    except toolchain.Missing as error:
        pytest.skip(str(error))


@linux
@pytest.mark.slow
def test_isolated_wheel_on_a_machine_without_cuda(tree, tmp_path):
    needs_compiler()
    before = processor_seconds()
    wheel, output = build_wheel(tree, tmp_path, **without_nvcc(tmp_path))
    # A minute on two cores; the clock on the wall would count what else the machine is doing.
    assert processor_seconds() - before < 120
    names, record = read_wheel(wheel)
    assert f"bertkd/_C{SUFFIX}" in names
    assert wheel.stat().st_size < 2_000_000
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-linux_" in wheel.name
    assert record["parts"] == ["cpu"]
    # One line says what was left out and why.
    (line,) = [x for x in output.splitlines() if x.strip().startswith("bertkd:")]
    assert "no cuda: " in line
    assert record["missing"]["cuda"] in line
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    check_library(tmp_path / "installed" / "bertkd" / f"_C{SUFFIX}")


@pytest.mark.slow
def test_wheel_on_a_machine_without_compilers_is_pure_python(tree, tmp_path):
    wheel, output = build_wheel(tree, tmp_path, **without_compilers(tmp_path))
    names, record = read_wheel(wheel)
    assert "-py3-none-any.whl" in wheel.name
    assert not [name for name in names if name.endswith(".so")]
    assert record["parts"] == []
    assert "no C++ compiler was found" in record["missing"]["cpu"]
    assert "install g++" in output


@linux
@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(tree, tmp_path):
    needs_compiler()
    code = "import sys; from build_support.backend import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tree,
        check=True,
        capture_output=True,
        env=environment(),
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += (ROOT / "build_support").glob("*.py")
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert not [name for name in names if name.startswith("tests")]
    wheel, _ = build_wheel(sdist, tmp_path, **QUICK, **without_nvcc(tmp_path))
    names, record = read_wheel(wheel)
    assert f"bertkd/_C{SUFFIX}" in names
    assert record["parts"] == ["cpu"]


@linux
@pytest.mark.slow
def test_from_git(tree, tmp_path):
    needs_compiler()
    if not shutil.which("git"):
        pytest.skip("there is no git")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tree, check=True, capture_output=True)
    wheel, _ = build_wheel(f"git+file://{tree}", tmp_path, **QUICK, **without_nvcc(tmp_path))
    names, record = read_wheel(wheel)
    assert f"bertkd/_C{SUFFIX}" in names
    assert record["parts"] == ["cpu"]


@pytest.fixture
def venv(tmp_path):
    """A fresh environment that sees this one's packages (torch, pip, setuptools), but not its bertkd."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@linux
@pytest.mark.slow
def test_editable_offline_without_isolation(tree, tmp_path, venv):
    needs_compiler()
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    changes = {**QUICK, **without_nvcc(tmp_path)}
    pip("install", *offline, "-e", tree, python=venv, **changes)
    assert (tree / "bertkd" / f"_C{SUFFIX}").exists()
    code = "import importlib, bertkd._C, bertkd._build as b; print(bertkd._C.__file__, b.missing('cpu'))"
    found = run_python(venv, tmp_path, code)
    assert found == f"{tree}/bertkd/_C{SUFFIX} None"
    # Triton kernels are found through the link.
    code = "import importlib.util as u; print(u.find_spec('bertkd.kernels.softmax_kl').origin)"
    assert Path(run_python(venv, tmp_path, code)).resolve() == tree / "kernels" / "softmax_kl.py"
    # An edit shows at once; a rebuild without a compiler takes the module away again.
    (tree / "bertkd" / "edited.py").write_text("value = 7\n")
    assert run_python(venv, tmp_path, "import bertkd.edited as e; print(e.value)") == "7"
    pip("install", *offline, "-e", tree, python=venv, BERTKD_BUILD="none")
    code = "import bertkd._build as b; print(b.missing('cpu'), b.lines()[0])"
    reason = "BERTKD_BUILD=none was set"
    assert run_python(venv, tmp_path, code) == f"{reason} cpu: not built: {reason}"
    assert not (tree / "bertkd" / f"_C{SUFFIX}").exists()


def run_python(python, folder, code):
    command = [str(python), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux
@pytest.mark.slow
def test_cuda_for_one_architecture(tree, tmp_path):
    needs_compiler()
    try:
        toolchain.probe_nvcc(toolchain.find_nvcc(), toolchain.find_cxx())
    except toolchain.Missing as error:
        pytest.skip(str(error))
    changes = {"BERTKD_BUILD": "cuda", "BERTKD_CUDA_ARCHS": "80", **QUICK}
    wheel, _ = build_wheel(tree, tmp_path, "--no-build-isolation", **changes)
    _, record = read_wheel(wheel)
    assert record["parts"] == ["cpu", "cuda"]
    assert record["cuda_archs"] == ["80"]
    assert record["cuda_ptx"] == "80"
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    check_library(installed / "bertkd" / f"_C{SUFFIX}")
    # It loads where there is no driver, and knows that.
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    code += (
        "import bertkd._C as c; print(c.cuda.runtime_version() >= 12000, c.cuda.driver_version())"
    )
    loaded, driver = run_python(sys.executable, tmp_path, code).split()
    assert loaded == "True"
    assert int(driver) >= 0
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    code += (
        "import bertkd._build as b; print([b.serves(c) for c in ((7, 5), (8, 0), (8, 6), (12, 1))])"
    )
    served = run_python(sys.executable, tmp_path, code)
    assert served == "[False, True, True, True]"


def make_plan(monkeypatch, **variables):
    for name in ("BERTKD_BUILD", "BERTKD_NVCC", "BERTKD_CUDA_ARCHS", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return plan.make_plan(ROOT)


@linux
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"BERTKD_BUILD": "gpu"}, "BERTKD_BUILD=gpu: must be one of auto, cpu, cuda, none"),
        ({"BERTKD_BUILD": "cpu", "CXX": "no-such-c++"}, "CXX=no-such-c[+][+] is not on the PATH"),
        ({"BERTKD_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "/nowhere has no bin/nvcc"),
        ({"BERTKD_BUILD": "cuda", "BERTKD_NVCC": "/nowhere"}, "BERTKD_NVCC=/nowhere is no file"),
        ({"BERTKD_BUILD": "cuda", "BERTKD_NVCC": "pypi"}, "has no nvidia-cuda-nvcc"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(variables, said, monkeypatch):
    needs_compiler()
    with pytest.raises(SystemExit, match=said):
        make_plan(monkeypatch, **variables)


@linux
def test_a_setuptools_that_cannot_read_the_project_is_named(monkeypatch):
    from build_support import commands

    commands.check_setuptools("77.0.3")
    monkeypatch.setattr(commands.setuptools, "__version__", "75.8.0")
    # The first is the first that pip runs, and compiles nothing.
    for command in ("dist_info", "build_ext"):
        with pytest.raises(
            SystemExit, match=r"setuptools 75.8.0 is too old.*pip install -U setuptools"
        ):
            commands.setup_arguments([command])


def test_what_was_not_asked_for_is_left_out_with_a_reason(monkeypatch, tmp_path):
    needs_compiler()
    found = make_plan(monkeypatch, CUDA_HOME="/nowhere")
    assert found.parts == ["cpu"]
    assert found.sentence() == (
        "bertkd: cpu; no cuda: CUDA_HOME=/nowhere has no bin/nvcc (correct or unset it)"
    )
    # As in a copy of a toolkit that lost its modes.
    (tmp_path / "nvcc").touch(0o644)
    found = make_plan(monkeypatch, BERTKD_NVCC=str(tmp_path / "nvcc"))
    assert found.missing["cuda"] == f"{tmp_path}/nvcc cannot be run (Permission denied)"
    found = make_plan(monkeypatch, CXX="no-such-c++")
    assert found.parts == []
    assert found.sentence().startswith("bertkd: pure Python; no cpu: CXX=no-such-c++")
    # "false" is a program that fails at whatever it is asked.
    found = make_plan(monkeypatch, CXX="false")
    assert found.parts == []


def test_flags_of_the_compiler_are_no_compiler_of_nvcc():
    assert toolchain.nvcc_host(["g++"]) == ["-ccbin", "g++"]
    assert toolchain.nvcc_host(["ccache", "g++", "-m64"]) == ["-ccbin", "g++", "-Xcompiler=-m64"]


KNOWN = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]


@pytest.mark.parametrize(
    ("asked", "archs", "ptx"),
    [
        ("", ["80", "86", "89", "90a", "100", "120"], "120"),
        ("90a", ["90a"], None),
        ("100f 120a", ["100f", "120a"], None),
        ("120; 80 86,86", ["80", "86", "120"], "120"),
    ],
)
def test_architectures(asked, archs, ptx, monkeypatch):
    monkeypatch.setenv("BERTKD_CUDA_ARCHS", asked)
    assert toolchain.choose_archs(KNOWN) == archs
    assert toolchain.ptx_arch(archs) == ptx


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("80;banana", "'banana' is no architecture.*80;90a;120.*knows 80, 86"),
        ("sm_80", "'sm_80' is no architecture"),
        ("75", "'75' is too old: the kernels need 80"),
        ("130", "'130' is not known to this nvcc"),
        ("90f", "'90f' is no architecture: 'f' is for 100 and newer"),
        ("86a", "'86a' is no architecture: 'a' is for 90 and newer"),
    ],
)
def test_architectures_that_make_no_sense(asked, said, monkeypatch):
    monkeypatch.setenv("BERTKD_CUDA_ARCHS", asked)
    with pytest.raises(toolchain.BadSetting, match=said):
        toolchain.choose_archs(KNOWN)


@linux
def test_architectures_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKD_CUDA_ARCHS", "native")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(toolchain.BadSetting, match=r"native: nvidia-smi cannot be run.*80;90a"):
        toolchain.choose_archs(KNOWN)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 8.6\necho 9.0\n")
    tool.chmod(0o755)
    assert toolchain.choose_archs(KNOWN) == ["86", "90"]


def test_an_older_nvcc_builds_what_it_knows(monkeypatch):
    monkeypatch.delenv("BERTKD_CUDA_ARCHS", raising=False)
    assert toolchain.choose_archs([70, 75, 80, 86]) == ["80", "86"]


def test_nvcc_comes_from_pypi_when_asked_for(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: [])
    monkeypatch.delenv("BERTKD_BUILD", raising=False)
    monkeypatch.delenv("BERTKD_NVCC", raising=False)
    assert backend.get_requires_for_build_wheel() == []
    monkeypatch.setenv("BERTKD_NVCC", "pypi")
    assert "nvidia-cuda-nvcc==13.0.*" in backend.get_requires_for_build_wheel()
    monkeypatch.setenv("BERTKD_BUILD", "cpu")
    assert backend.get_requires_for_build_wheel() == []
