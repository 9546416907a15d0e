"""The setuptools commands that build ``bertkd._C`` and leave the record of it in the package."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_support.compile import build as build_native
from build_support.plan import Plan, extension_suffix, make_plan

ROOT = Path(__file__).resolve().parent.parent
# Commands that compile: `egg_info` or `sdist` must not probe for compilers.
COMPILING = (
    "build",
    "build_ext",
    "build_py",
    "bdist_wheel",
    "editable_wheel",
    "install",
    "develop",
)


def check_setuptools(version: str) -> None:
    """Say what is wrong where setuptools would only quote its schema: it must read ``license = "Apache-2.0"``.

    Raises:
        SystemExit: it is too old. pip brings one of its own; ``python setup.py`` and ``--no-build-isolation`` do not.
    """
    if int(version.split(".")[0]) < 77:
        raise SystemExit(
            f"bertkd: setuptools {version} is too old to build this package, 77 is needed: pip install -U setuptools"
        )


def setup_arguments(arguments: list[str]) -> dict:
    """What setup.py adds to pyproject.toml, for the commands in ``arguments``."""
    check_setuptools(setuptools.__version__)
    if not any(argument in COMPILING for argument in arguments):
        return {}
    plan = make_plan(ROOT)
    print(plan.sentence(), file=sys.stderr)

    def package_folder(command) -> Path:
        in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
        return (ROOT if in_place else Path(command.build_lib)) / "bertkd"

    def write_record(command) -> None:
        folder = package_folder(command)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(plan.record(), indent=1) + "\n")

    class CleanBuild(build):
        """A module deleted since the last build must not reach the wheel."""

        def run(self) -> None:
            shutil.rmtree(self.build_lib, ignore_errors=True)
            super().run()

    class RecordedBuild(build_py):
        """Python files, and the record where nothing is compiled; else it is written once the compilers are done."""

        def run(self) -> None:
            super().run()
            if not plan.parts:
                write_record(self)
                (package_folder(self) / f"_C{extension_suffix()}").unlink(missing_ok=True)

    class NativeBuild(build_ext):
        """ninja instead of setuptools' compiler classes, which know nothing of nvcc."""

        def run(self) -> None:
            super().run()
            write_record(self)

        def build_extension(self, ext: Extension) -> None:
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            build_native(plan, ROOT, _objects(plan), output)

    # Without an extension the wheel is tagged py3-none-any, with one for this Python and platform.
    extensions = [Extension("bertkd._C", [])] if plan.parts else []
    commands = {"build": CleanBuild, "build_py": RecordedBuild, "build_ext": NativeBuild}
    return {"ext_modules": extensions, "cmdclass": commands}


def _objects(plan: Plan) -> Path:
    """Object files stay between builds, apart for every Python and set of parts."""
    return ROOT / "build" / f"native-{plan.python}-{plan.machine}-{'-'.join(plan.parts)}"
