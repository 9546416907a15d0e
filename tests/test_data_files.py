"""Reading local files, and saying where something is wrong in them."""

import csv
import json

import pytest

from bertkd.data.files import find_split, read_table, read_tables
from bertkd.data.tables import join


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_keeps_quoted_commas_quotes_and_line_breaks(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"a, ""b""\nc",1\nd,0\n')
    table = read_table(path)
    assert table.columns == {"text": ['a, "b"\nc', "d"], "label": ["1", "0"]}
    assert len(table) == 2
    assert table.where(1) == f"{path}, row 2"


def test_tsv_has_no_quoting(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"open quote\t1\nplain\t0\n')
    assert read_table(path).columns["text"] == ['"open quote', "plain"]


def test_header_may_be_given_and_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbfx\t1\ny\t0\n")
    assert read_table(path, header=("text", "label")).columns["text"] == ["x", "y"]


def test_json_lines_keep_types_and_absent_values(tmp_path):
    rows = [{"text": "a", "label": 0.5}, {"text": "b"}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_table(path).columns == {"text": ["a", "b"], "label": [0.5, None]}


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [1, None]}), path)
    assert read_table(path).columns == {"text": ["a", "b"], "label": [1, None]}


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = write(tmp_path, "a.parquet", "PAR1")
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\n", "is empty: it has no rows"),
        ("a.csv", "", "is empty: it has no rows"),
        ("a.jsonl", "\n", "is empty: it has no rows"),
        ("a.csv", "text,label\na,1\nb\n", r"row 2: 1 fields, but the header has 2 \(text, label\)"),
        ("a.csv", "text;label\na;1\n", r"one column, .text;label.\. A file ending in .csv"),
        ("a.csv", "text,text\na,1\n", "names a column twice"),
        ("a.csv", 'text,label\n"a"b,1\n', "line 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "line 1: not an object"),
        ("a.xlsx", "x", r"unknown format '.xlsx'; known: .csv"),
        ("a.parquet", "x", "not a readable Parquet file"),
    ],
)
def test_broken_files_are_refused_with_their_place(tmp_path, name, text, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_latin_1_is_refused_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nné,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_table(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_table(tmp_path / "none.csv")


def test_ragged_rows_can_be_skipped(tmp_path):
    path = write(tmp_path, "a.tsv", "text\tlabel\na\t1\nb\nc\t0\n")
    with pytest.warns(UserWarning, match="a.tsv: 1 of 3 rows have missing or surplus fields"):
        assert read_table(path, skip_ragged=True).columns["text"] == ["a", "c"]


def test_long_texts_are_read_and_the_limit_of_csv_is_left_alone(tmp_path):
    limit = csv.field_size_limit()
    text = "a " * limit
    assert read_table(write(tmp_path, "a.csv", f"text\n{text}\n")).columns == {"text": [text]}
    assert csv.field_size_limit() == limit


def test_files_of_two_names_for_one_split_are_refused(tmp_path):
    for name in ("validation.csv", "dev.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"has both validation\.csv and dev\.jsonl, which stand for"
    ):
        find_split(tmp_path, ["validation", "valid", "dev"])
    (tmp_path / "validation.csv").rename(tmp_path / "dev.parquet")
    assert find_split(tmp_path, ["validation", "valid", "dev"]) == [tmp_path / "dev.parquet"]


def test_incomplete_or_doubled_splits_are_refused(tmp_path):
    write(tmp_path, "train-00000-of-00003.csv", "text,label\na,1\n")
    write(tmp_path, "train-00002-of-00003.csv", "text,label\nc,1\n")
    with pytest.raises(ValueError, match=r"2 shards that say 'of 00003' \(train-00000.*missing"):
        find_split(tmp_path, ["train"])
    write(tmp_path, "train-00001-of-00003.csv", "text,label\nb,1\n")
    assert len(find_split(tmp_path, ["train"])) == 3
    write(tmp_path, "train.csv", "text,label\na,1\n")
    with pytest.raises(ValueError, match=r"both train.csv and train-00000-of-00003.csv"):
        find_split(tmp_path, ["train"])


def test_shards_become_one_table_that_knows_its_files(tmp_path):
    first = write(tmp_path, "train-00000-of-00002.csv", "text,label\na,1\nb,1\n")
    second = write(tmp_path, "train-00001-of-00002.csv", "text,label\nc,0\n")
    paths = find_split(tmp_path, ["training", "train"])
    assert paths == [first, second]
    table = read_tables(paths)
    assert table.columns["text"] == ["a", "b", "c"]
    assert table.where(2) == f"{second}, row 1"
    assert table.take([2, 0]).where(0) == f"{second}, row 1"
    assert table.take([2, 0]).take([1]).where(0) == f"{first}, row 1"


def test_tables_with_other_columns_are_not_joined(tmp_path):
    tables = [
        read_table(write(tmp_path, f"{name}.csv", f"text,{name}\na,1\n")) for name in ("x", "y")
    ]
    with pytest.raises(ValueError, match="columns differ"):
        join(tables)
