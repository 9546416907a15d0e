"""`make gpu` without a GPU: a stand-in for Python says what it was asked to do, and a clock of the test's own ticks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("build", "test", "bench")
TABLE = "case  impl  ms  x eager"

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")

# In the place of Python. `-c` is the Makefile's own arithmetic; a part takes its time on the clock and fails or not.
PYTHON = f"""#!{sys.executable}
import json, os, subprocess, sys
from pathlib import Path
words, folder = sys.argv[1:], Path(os.environ["STAND_INS"])
if words[0] == "-c":
    sys.exit(subprocess.run([sys.executable, *words]).returncode)
part = {{"setup.py": "build", "pytest": "test", "bertkd.bench": "bench"}}[words[words[0] == "-m"]]
archs = os.environ.get("BERTKD_CUDA_ARCHS")
with (folder / "log").open("a") as log:
    print(json.dumps({{"part": part, "words": words, "archs": archs}}), file=log)
clock = folder / "clock"
plan = json.loads((folder / "plan").read_text())[part]
clock.write_text(str(int(clock.read_text()) + plan["seconds"]))
print({TABLE!r} if part == "bench" else "much output of " + part)
sys.exit(plan["code"])
"""
# `timeout [-s SIGNAL] [-k SECONDS] SECONDS COMMAND...`, which notes the signal and the seconds, and cuts nothing off.
TIMEOUT = """#!/bin/sh
signal=TERM
while getopts s:k: option; do [ $option = s ] && signal=$OPTARG; done
shift $((OPTIND - 1))
echo "$signal $1" >> "$STAND_INS/timeouts"
shift
exec "$@"
"""
DATE = '#!/bin/sh\ncat "$STAND_INS/clock"\n'


@pytest.fixture
def make(tmp_path):
    """Runs ``make`` and gives what it did, what was asked of Python by part, and the time that parts were given."""
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT), ("date", DATE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*words, seconds=(0, 0, 0), codes=(0, 0, 0)):
        plan = {p: {"seconds": s, "code": c} for p, s, c in zip(PARTS, seconds, codes, strict=True)}
        (tmp_path / "plan").write_text(json.dumps(plan))
        (tmp_path / "clock").write_text("1700000000")
        for name in ("log", "timeouts"):
            (tmp_path / name).write_text("")
        # The tests themselves may run below a make.
        kept = {
            k: v
            for k, v in os.environ.items()
            if "MAKE" not in k and k not in ("SELECT", "ARGS", "LIMIT")
        }
        path = os.pathsep.join([str(tmp_path), kept["PATH"]])
        done = subprocess.run(
            ["make", *words, f"PYTHON={tmp_path / 'python'}"],
            cwd=ROOT,
            env=kept | {"PATH": path, "STAND_INS": str(tmp_path), "LC_ALL": "C"},
            capture_output=True,
            text=True,
        )
        asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        given = [line.split() for line in (tmp_path / "timeouts").read_text().splitlines()]
        return done, {call["part"]: call for call in asked}, given

    return run


def minutes(call):
    words = call["words"]
    return float(words[words.index("--budget_minutes") + 1])


def test_build_tests_and_benchmark_share_the_time(make):
    done, asked, given = make("gpu", seconds=(60, 120, 300))
    assert done.returncode == 0, done.stderr
    assert list(asked) == list(PARTS)
    # Half of ten minutes at most; half of what the build has left; the rest, but for what starting and plots take.
    # Tests are interrupted: on a termination pytest would not say which have failed so far.
    assert given == [["TERM", "300"], ["INT", str((600 - 60) // 2)]]
    assert minutes(asked["bench"]) == pytest.approx((600 - 45 - 180) / 60)
    _, asked, given = make("gpu", "LIMIT=15", seconds=(450, 225, 0))
    assert given == [["TERM", "450"], ["INT", "225"]]
    assert minutes(asked["bench"]) == pytest.approx((900 - 45 - 675) / 60)
    # A benchmark without any time would measure nothing at all.
    _, asked, _ = make("gpu", "LIMIT=1", seconds=(30, 15, 0))
    assert minutes(asked["bench"]) == 0.5


@pytest.mark.parametrize("failing", PARTS)
def test_a_part_that_fails_is_named_and_costs_the_others_nothing(failing, make):
    done, asked, _ = make("gpu", codes=[3 * (part == failing) for part in PARTS])
    assert done.returncode != 0
    assert list(asked) == list(PARTS)
    assert re.findall(r"gpu-(\w+)\] Error 3", done.stderr) == [failing]


def test_the_table_is_the_last_that_a_run_says(make):
    done, *_ = make("gpu", codes=(0, 1, 0))
    said = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert said[-1] == TABLE


def test_words_reach_the_part_that_they_are_for(make):
    _, asked, _ = make("gpu", "SELECT=relation_kl, L=512", "ARGS=-k 'not long'")
    assert asked["build"]["archs"] == "native"
    assert asked["build"]["words"] == ["setup.py", "build_ext", "--inplace"]
    assert asked["test"]["words"][-2:] == ["-k", "not long"]
    assert "--continue-on-collection-errors" in asked["test"]["words"]
    bench = asked["bench"]["words"]
    assert bench[2:4] == ["--device", "cuda"]
    assert bench[-2:] == ["--select", "relation_kl, L=512"]
    _, asked, given = make("gpu-bench", "MINUTES=5")
    assert list(asked) == ["bench"]
    assert minutes(asked["bench"]) == 5
    assert given == []


@pytest.mark.parametrize("path", ["/somebody/s venv", ""])
def test_a_path_that_make_would_take_for_several_is_refused(path, make):
    done, *_ = make("--dry-run", "clean", f"VENV={path}")
    assert done.returncode != 0
    assert f"VENV={path}: must be one path without spaces" in done.stderr
    assert "rm -rf" not in done.stdout


def test_every_test_that_needs_a_gpu_is_run(make):
    _, asked, _ = make("gpu-test")
    files = {word for word in asked["test"]["words"] if word.startswith("tests/")}
    marked = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    }
    assert marked <= files
