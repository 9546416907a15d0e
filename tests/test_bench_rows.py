"""The benchmark's data: columns, merging, selection, ratios, targets, summary, README block."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bertkd.bench import readme, summary, targets
from bertkd.bench.cases import Case, cases_for
from bertkd.bench.ddp import ddp_cases_for
from bertkd.bench.record import COLUMNS, STATUSES, Row, merge, read_rows, write_rows
from bertkd.bench.runner import all_cases
from bertkd.bench.selection import known_values, parse_selection
from bertkd.bench.step_cases import step_cases_for
from bertkd.bench.timing import ratios, spread

ROOT = Path(__file__).parent.parent

MAIN = Row(
    "op",
    "relation_kl",
    "eager",
    8,
    12,
    128,
    64,
    64,
    dtype="float32",
    mode="fwd_bwd",
    metric="time",
    p20=30.0,
    p50=36.0,
    p80=40.0,
    unit="ms",
    rounds=15,
    device="A CPU, 2 cores",
    threads=2,
    torch="2.13.0+cpu",
    commit="abc1234567",
)


def rows_of(impl, milliseconds, gain):
    """Time and speed-up of a contestant in the main case."""
    time = replace(MAIN, impl=impl, p20=None, p50=milliseconds, p80=None)
    speedup = replace(time, metric="speedup", unit="x", p50=gain, against="eager")
    return [time, speedup]


ROWS = [MAIN, *rows_of("native", 9.0, 4.0), *rows_of("chunked", 30.0, 1.2)]


def test_rows_survive_the_file(tmp_path):
    rows = [
        *ROWS,
        replace(MAIN, impl="triton", p50=None, status="unavailable", note='no "GPU", here'),
    ]
    path = write_rows(tmp_path / "results.csv", rows)
    assert read_rows(path) == rows
    with path.open(newline="") as handle:
        assert tuple(next(csv.reader(handle))) == COLUMNS
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("op,impl\nrelation_kl,eager\n")
    with pytest.raises(ValueError, match="columns"):
        read_rows(path)


def test_a_new_measurement_replaces_all_metrics_of_the_old_one():
    red = replace(MAIN, impl="native", p50=None, status="red", note="off by 1")
    merged = merge(ROWS, [red])
    # A speed-up of what is now known to be wrong must not stay.
    assert [row for row in merged if row.impl == "native"] == [red]
    assert [row for row in merged if row.impl != "native"] == [
        r for r in ROWS if r.impl != "native"
    ]
    # Another machine's figures are its own.
    elsewhere = [replace(row, device="Another CPU") for row in ROWS]
    assert merge(elsewhere, ROWS) == [*elsewhere, *ROWS]


def test_a_new_time_leaves_the_largest_batch_until_it_is_searched_for_again():
    largest = replace(MAIN, metric="largest_batch", p50=512.0)
    assert merge([MAIN, largest], [MAIN]) == [largest, MAIN]
    again = replace(largest, p50=600.0)
    assert merge([MAIN, largest], [MAIN, again]) == [MAIN, again]
    red = replace(MAIN, p50=None, status="red")
    assert merge([MAIN, largest], [red]) == [red]


def test_a_rival_that_is_not_installed_this_time_keeps_what_it_had():
    rival = replace(MAIN, impl="liger", p50=3.0)
    missing = replace(rival, p50=None, status="unavailable", note="not installed")
    assert merge([MAIN, rival], [missing]) == [MAIN, rival]
    assert merge([MAIN, missing], [missing]) == [MAIN, missing]
    assert merge([MAIN, missing], [rival]) == [MAIN, rival]
    red = replace(missing, status="red")
    assert merge([rival], [red]) == [red]
    # What bertkd itself cannot run any more is no figure of it.
    ours = replace(rival, impl="triton")
    gone = replace(missing, impl="triton")
    assert merge([ours], [gone]) == [gone]


def test_a_case_that_failed_as_a_whole_is_forgotten_once_it_is_measured():
    failed = replace(MAIN, impl="*", mode="", p50=None, status="oom")
    other = replace(failed, length=4096)
    assert merge([failed, other], [MAIN]) == [other, MAIN]
    # It takes nothing away of what was measured before.
    assert merge([MAIN], [failed]) == [MAIN, failed]


def test_spread_and_ratios():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)
    # The machine slows down in the second round; the pairs' ratios do not notice.
    assert ratios([10.0, 40.0], [5.0, 20.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct_ordered_and_at_the_designs_shapes(device):
    cases = all_cases(device)
    assert sorted(cases, key=lambda case: case.importance) == cases
    rows = [Row(**case.columns, impl="eager") for case in cases]
    assert len({row.group for row in rows}) == len(rows)
    for target in targets.TARGETS:
        if target.device == ("cpu" if device == "cpu" else "gpu"):
            mine = [
                case
                for case in cases
                if targets.matches(Row(**case.columns, impl="eager", mode=target.mode), target)
            ]
            assert [case.importance for case in mine] == [1], target


def known():
    cases = [*cases_for("cpu"), *step_cases_for("cpu"), *ddp_cases_for("cpu")]
    return cases, known_values(cases, impl=("eager", "native"), mode=("fwd", "fwd_bwd", "step"))


def test_selection():
    cases, values = known()
    chosen = parse_selection("relation_kl, L=128|512, kind=op, impl=nat*, mode=fwd_bwd", values)
    picked = [case for case in cases if chosen.takes(case)]
    assert {case.op for case in picked} == {"relation_kl"}
    assert {case.length for case in picked} == {128, 512}
    assert {case.kind for case in picked} == {"op"}
    assert chosen.allows("impl", "native")
    assert not chosen.allows("impl", "eager")
    assert not chosen.allows("mode", "fwd")
    steps = parse_selection("step", values)
    assert {case.kind for case in cases if steps.takes(case)} == {"step"}
    assert all(parse_selection(None, values).takes(case) for case in cases)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relatoin_kl", "unknown op in select 'relatoin_kl'. Did you mean 'relation_kl'"),
        ("impl=nativ", "Did you mean 'native'"),
        ("impls=native", "unknown field of select 'impls'. Did you mean 'impl'"),
        ("L=127", "unknown L in select '127'"),
        ("L=128,L=512", "says L twice"),
        ("mode=backward", "unknown mode in select 'backward'"),
        (" , ", "names nothing"),
    ],
)
def test_selection_refuses_what_is_not_there(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_selection(text, known()[1])


def test_targets_take_the_best_and_say_what_is_missing():
    found = {
        (outcome.target.impls, outcome.target.against, outcome.target.shape): outcome
        for outcome in targets.outcomes(ROWS, "cpu")
    }
    shape = "B8 H12 L128 Ds64"
    native = found[("native",), "eager", shape]
    assert (native.reached, native.met) == (4.0, True)
    assert found[("chunked",), "eager", shape].met is True
    assert found[("native",), "eager", "B4 H12 L512 Ds64"].met is None
    slow = [MAIN, *rows_of("native", 18.0, 2.0)]
    assert next(o for o in targets.outcomes(slow, "cpu") if o.reached).met is False


def test_rows_of_several_commits_are_told_apart():
    other = [replace(row, length=512, commit="def7654321") for row in ROWS]
    assert "| commit |" not in summary.markdown(ROWS, {})
    lines = summary.markdown([*ROWS, *other], {}).splitlines()
    for length, commit in ((128, "abc1234"), (512, "def7654")):
        rows = [line for line in lines if f" L{length} " in line and "fwd_bwd" in line]
        assert len(rows) == 3
        assert all(f"| {commit} |" in row for row in rows)


def test_summary_has_every_figure_the_misses_and_the_reasons():
    missing = replace(MAIN, impl="liger", p50=None, status="unavailable", note="not installed")
    text = summary.markdown([*ROWS, missing], {"left_out": ["linear_kl[N1]"]}, ["length.png"])
    assert "36 (30 to 40)" in text
    assert "relation_kl B8 H12 L128 Ds64 | at least 3.5x eager | 4x | native | 1.14 |" in text
    assert "liger: unavailable, not installed (1 measurements)" in text
    assert "left out for want of time: linear_kl[N1]" in text
    assert "![length](length.png)" in text
    slow = summary.markdown([MAIN, *rows_of("native", 18.0, 2.0)], {})
    assert "0.571 **missed**" in slow
    assert "not measured" in slow
    for status in STATUSES:
        assert re.fullmatch(r"[a-z-]+", status)


def test_short_table_lines_up():
    lines = summary.short_table(ROWS).splitlines()
    assert lines[0].split() == ["case", "impl", "ms", "x", "eager"]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [line.split()[-3:] for line in lines[1:]] == [
        ["native", "9", "4"],
        ["chunked", "30", "1.2"],
    ]
    values = [replace(row, mode="fwd") for row in rows_of("native", 1.0, 9.0)]
    assert summary.short_table([*ROWS, *values]) == summary.short_table(ROWS)
    for without in ([MAIN], values):
        assert "no speed-up over eager with gradients" in summary.short_table(without)


def test_readme_block_comes_from_the_rows():
    text = readme.block(ROWS)
    assert "A CPU, 2 cores, 2 threads, torch 2.13.0 (commit abc1234567)" in text
    assert "| `relation_kl` (8, 12, 128, 64) | 36 ms | 30 ms, 1.2x | 9 ms, 4.0x |" in text
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    new = readme.replace(page, text)
    assert text in new
    assert "old" not in new
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert readme.replace(new, text) == new
    with pytest.raises(ValueError, match="measured:begin"):
        readme.replace("no markers", text)
    with pytest.raises(ValueError, match="no speed-up"):
        readme.block([MAIN])


def test_readme_shows_the_latest_of_a_kind_and_links_the_others():
    def on(device, date, rows=ROWS):
        return [replace(row, device=device, date=date) for row in rows]

    gpu = [MAIN, *rows_of("triton", 0.5, 72.0)]
    rows = [
        *on("Old CPU, AVX2", "2026-01-01"),
        *on("New CPU", "2026-02-01"),
        *on("Older GPU", "2026-01-01", gpu),
        *on("A GPU", "2026-01-02", gpu),
    ]
    text = readme.block(rows)
    assert [line[:12] for line in text.splitlines() if line[:3] == "On "] == [
        "On New CPU, ",
        "On A GPU, 2 ",
    ]
    assert text.endswith(
        "Measured too: [Old CPU, AVX2](benchmarks/results/old-cpu-avx2/summary.md), "
        "[Older GPU](benchmarks/results/older-gpu/summary.md)."
    )


def test_readme_holds_the_committed_figures():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = readme.committed_rows(ROOT)
    assert rows, "benchmarks/results holds no results.csv"
    assert page == readme.replace(page, readme.block(rows)), "run `python -m bertkd.bench readme`"


def test_committed_summaries_are_those_of_the_committed_rows():
    folders = sorted((ROOT / "benchmarks" / "results").iterdir())
    assert folders
    for folder in folders:
        text = (folder / "summary.md").read_text(encoding="utf-8")
        pictures = re.findall(r"^!\[\w+\]\((\w+\.png)\)$", text, re.MULTILINE)
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        made = summary.markdown(read_rows(folder / "results.csv"), facts, pictures)
        assert text == made, f"run `python -m bertkd.bench report {folder.relative_to(ROOT)}`"
        assert {*pictures} == {path.name for path in folder.glob("*.png")}


def test_readme_is_checked_without_being_written(monkeypatch, capsys):
    monkeypatch.setattr(readme, "write_text", lambda *_: pytest.fail("it was written"))
    assert readme.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(readme, "block", lambda rows: "other figures")
    assert readme.main(["--check"]) == 1
    assert "README.md differs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="measured:end"):
        readme.replace(f"{readme.BEGIN}\nno end", "figures")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1234.5, "1,234"), (999.7, "1,000"), (99.96, "100"), (0.0123, "0.0123"), (5e-4, "5.0e-04")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert summary.number(value) == text


def test_case_names_are_readable():
    case = Case("relation_kl", 8, 12, 128, 64, 64, padding="glue")
    assert case.name == "relation_kl[B8 H12 L128 Ds64 Dt64 float32 glue]"
