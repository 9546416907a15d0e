"""The shape of the repository: what would break an installation or a neighbour's import."""

import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
