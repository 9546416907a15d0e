"""Tables as text and Markdown, and the figures in them."""

import pytest

from bertkd.study.table import Table, human_time, mean_std


def test_text_and_markdown_line_up():
    table = Table(["model", "MRR"])
    table.add("teacher", "0.444")
    table.add("distilled student", "0.43")
    assert table.text() == (
        "model                MRR\n"
        "-----------------  -----\n"
        "teacher            0.444\n"
        "distilled student   0.43"
    )
    assert table.markdown() == (
        "| model             |   MRR |\n"
        "| ----------------- | ----: |\n"
        "| teacher           | 0.444 |\n"
        "| distilled student |  0.43 |"
    )


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match="2 cells"):
        Table(["a", "b"]).add("1")


def test_figures():
    # statistics.stdev([1, 2, 3]) is 1 (n - 1 in the denominator).
    assert mean_std([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_std([0.5]) == "0.500"
    with pytest.raises(ValueError, match="at least one"):
        mean_std([])
    assert [human_time(s) for s in (7, 187, 3723)] == ["0:07", "3:07", "1:02:03"]
