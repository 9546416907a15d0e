"""Every Python block of the README runs, in order, in one namespace, in an empty folder."""

import re
from pathlib import Path

import pytest

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
