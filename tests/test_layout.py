"""The shape of the repository: what would break an installation or a neighbour's import."""

import statistics
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# The one version of Triton that torch's builds for CUDA depend on, by the version of torch. A constraint without room
# for it leaves pip without a solution wherever torch comes with CUDA, which is on most machines.
TRITON_OF_TORCH = {"2.13.0": "3.7.1"}


def test_kernels_is_no_package_and_reaches_the_package_by_a_link():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "bertkd" / "kernels").is_symlink()
    assert (ROOT / "bertkd" / "kernels").resolve() == ROOT / "kernels"


def test_source_files_stay_short():
    kinds = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh")
    folders = ("bertkd", "kernels", "csrc", "tests", "build_support", "benchmarks", "examples")
    files = [p for name in folders for p in (ROOT / name).rglob("*") if p.suffix in kinds]
    lengths = {p: len(p.read_text().splitlines()) for p in files}
    assert not [p.name for p, length in lengths.items() if length > 400]
    assert statistics.median(lengths.values()) < 150


def test_the_constraints_suit_every_build_of_torch_and_every_python():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    found = {each.name: each for each in wanted}
    (torch,) = found["torch"].specifier
    assert found["triton"].specifier.contains(TRITON_OF_TORCH[torch.version])
    # What has left Python 3.10 behind must not be asked for there.
    left_behind = {"numpy", "scipy", "scikit-learn", "matplotlib", "transformers"}
    old = {"python_version": "3.10"}
    assert not {name for name in left_behind if not (m := found[name].marker) or m.evaluate(old)}


def test_public_names_have_docstrings():
    import inspect

    from bertkd import functional, modules

    for name in functional.__all__:
        text = inspect.getdoc(getattr(functional, name))
        assert text, f"functional.{name} has no docstring"
        assert len(text) > 80, f"functional.{name} says too little"
    for name, value in vars(modules).items():
        if (
            inspect.isclass(value)
            and value.__module__ == "bertkd.modules"
            and not name.startswith("_")
        ):
            assert inspect.getdoc(value), f"modules.{name} has no docstring"


def test_what_can_be_completed_is_listed_once():
    import bertkd
    import bertkd.functional

    # A submodule stands among the package's own names as soon as it is loaded. dir() keeps what is told twice.
    names = dir(bertkd)
    assert names.count("functional") == 1
    assert set(bertkd.__all__) <= set(names)
