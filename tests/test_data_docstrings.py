"""Docstrings: what is read of a source, and the cache of it."""

import re
from collections import Counter

import pytest

from bertkd.data import read_docstrings
from bertkd.data.doc_splits import group_of
from bertkd.data.docstrings import Docstring, parse_folder, text_key

SOURCE = '''"""Module with a text of words."""
import nowhere_to_be_found

def plain(a, b: int = 3, *args, key=None, **rest) -> str:
    """
    First line of five words.

        Indented.
    """

class Thing:
    """A thing of five words here."""

    def method(self, x):
        """Do something with the x given."""

    @classmethod
    async def make(cls, /, y=(1, 2)):
        """Make a thing of the y."""

    def short(self):
        """Four words are few."""

if True:
    try:
        def hidden(): "One two three four five."
    except Exception:
        def fallback(): "Other words than the first."
'''


def test_parsed_records(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mod.py").write_text(SOURCE)
    (tmp_path / "sub" / "__init__.py").write_text("")
    (tmp_path / "broken.py").write_text("def f(:\n")
    for skipped in ("test", "tests", "site-packages", "config-3.11"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "mod.py").write_text(SOURCE)
    found = {record.qualname: record for record in parse_folder(tmp_path, "stdlib")}
    assert found["plain"] == Docstring(
        source="stdlib",
        package="sub",
        module="sub.mod",
        qualname="plain",
        kind="function",
        signature="(a, b: int=3, *args, key=None, **rest) -> str",
        text="First line of five words.\n\n    Indented.",
        path="sub/mod.py",
    )
    kinds = {name: (record.kind, record.signature) for name, record in found.items()}
    assert kinds == {
        "": ("module", ""),
        "plain": ("function", "(a, b: int=3, *args, key=None, **rest) -> str"),
        "Thing": ("class", ""),
        "Thing.method": ("function", "(x)"),
        "Thing.make": ("function", "(y=(1, 2))"),
        "hidden": ("function", "()"),
        "fallback": ("function", "()"),
    }
    named = [record.module for record in parse_folder(tmp_path, "stdlib", "top")]
    assert set(named) == {"top.sub.mod"}


def test_the_standard_library_has_what_the_tasks_need(records):
    groups = Counter(map(group_of, records))
    assert len(records) > 4000
    assert sum(count >= 50 for count in groups.values()) >= 25
    assert {record.source for record in records} == {"stdlib"}
    packages = {record.package for record in records}
    assert not packages & {"test", "torch", "numpy", "pip", "setuptools"}
    assert all(len(record.text.split()) >= 5 for record in records)


def test_no_text_comes_twice(records):
    keys = [" ".join(re.findall("[a-z]+", record.text.lower())) for record in records]
    keys = [key for key in keys if key]
    assert len(keys) - len(set(keys)) < 0.001 * len(keys)
    assert len({text_key(record.text) for record in records}) == len(records)


# Cache


def test_cache_is_used_and_rebuilt_where_damaged(cache_dir, records, tmp_path, monkeypatch):
    (file,) = cache_dir.iterdir()
    assert re.fullmatch(r"docstrings-stdlib-[\w.+]+-[0-9a-f]{12}\.jsonl", file.name)
    copy = tmp_path / file.name
    lines = file.read_text().splitlines(keepends=True)

    parsed = []
    monkeypatch.setattr(
        "bertkd.data.docstring_cache.parse_folder",
        lambda root, source, package: parsed.append(source) or iter(records[:3]),
    )
    copy.write_text("".join(lines))
    assert read_docstrings(cache_dir=tmp_path) == records
    assert not parsed
    for damaged in (
        "".join(lines[:-5]),
        "".join(lines)[:-40],
        "no json\n",
        '{"count": 0, "a"\n',
        "",
    ):
        copy.write_text(damaged)
        assert read_docstrings(cache_dir=tmp_path) == records[:3]
    assert len(parsed) == 5
    assert read_docstrings(cache_dir=tmp_path) == records[:3]
    assert len(parsed) == 5
    assert list(tmp_path.iterdir()) == [copy]


def test_default_cache_and_unwritable_cache(records, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("bertkd.data.docstring_cache.parse_folder", lambda *args: iter(records[:3]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_docstrings()
    assert len(list((tmp_path / "bertkd").iterdir())) == 1
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert read_docstrings(cache_dir=blocked) == records[:3]
    assert "not cached" in caplog.text


def test_unknown_and_missing_sources(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"unknown docstring source 'stdlb'. Did you mean 'stdlib'"
    ):
        read_docstrings(["stdlb"], cache_dir=tmp_path)
    with pytest.raises(ValueError, match="sources is empty"):
        read_docstrings([], cache_dir=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install numpy, or leave it out"):
        read_docstrings(["numpy"], cache_dir=tmp_path)


def test_other_sources_come_on_top(cache_dir, records):
    more = read_docstrings(("stdlib", "numpy"), cache_dir=cache_dir)
    assert more[: len(records)] == records
    extra = more[len(records) :]
    assert {record.source for record in extra} == {"numpy"}
    assert len(extra) > 500
    assert {"numpy.linalg", "numpy.ma"} <= set(map(group_of, extra))
