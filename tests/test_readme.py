"""Every Python block of the README runs, in order, in one namespace, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest

from bertkd.objectives import TERMS

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 3


def test_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, block in enumerate(BLOCKS):
        try:
            exec(compile(block, f"README block {number}", "exec"), namespace)
        except Exception as error:
            pytest.fail(f"README block {number} failed: {error!r}\n{block}")


# The pages for users; what stands in <angle brackets> or capitals is theirs to fill in.
PAGES = [README, *(README.parent / "docs" / name for name in ("benchmarks.md", "migrating.md"))]
SHELL = [
    line.partition("#")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("bertkd ")])
def test_commands_parse(line):
    pytest.importorskip("jsonargparse")
    from bertkd.cli.main import build_parser
    from bertkd.cli.plain import with_underscores

    words = with_underscores(shlex.split(line)[1:])
    assert build_parser().parse_args(words).command == words[0]


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_targets_exist(line):
    makefile = (README.parent / "Makefile").read_text()
    assert re.search(rf"^{line.split()[1]}:", makefile, re.M)


def test_every_term_has_a_row():
    (table,) = re.findall(r"^\| term \|.*\n((?:\|.*\n)+)", README.read_text(), re.MULTILINE)
    firsts = [row.split("|")[1] for row in table.splitlines()]
    named = [name for first in firsts for name in re.findall(r"`(\w+)`", first)]
    assert sorted(named) == sorted(TERMS)
