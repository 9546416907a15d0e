"""Two trees against each other: the verdict, turns, and a process for either."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bertkd.bench import compare, runner
from bertkd.bench.cases import attention

SMALL = attention("relation_kl", (4, 3, 20, 8), "float32", padding="glue")


@pytest.mark.parametrize(
    ("base", "new", "word"),
    [
        ([1.00, 1.01, 0.99], [1.00, 1.02, 1.00], "same"),
        ([1.00, 1.01, 0.99], [1.25, 1.24, 1.26], "slower"),
        ([1.00, 1.01, 0.99], [0.80, 0.81, 0.79], "faster"),
        ([1.00, 1.40, 0.80], [1.20, 1.60, 1.00], "unclear"),
        # Both sides slow down together: the pairs show that nothing changed.
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "same"),
        ([1.00, 1.00, 1.00], [1.09, 1.09, 1.09], "same"),
    ],
)
def test_verdicts(base, new, word):
    assert compare.judge(base, new).word == word


def test_timer_takes_turns(monkeypatch):
    order = []

    def one(self, tree):
        order.append(tree)
        return 1.0

    monkeypatch.setattr(compare.Timer, "_one", one)
    timer = compare.Timer(SMALL, "chunked", "fwd", 3, "cpu")
    assert timer.pairs("base", "new", 3) == ([1.0] * 3, [1.0] * 3)
    assert order == ["base", "new", "new", "base", "base", "new"]


def test_either_tree_is_timed_by_this_code_in_a_process_of_its_own(tmp_path):
    root = runner.Path(runner.__file__).resolve().parents[2]
    timer = compare.Timer(SMALL, "chunked", "fwd_bwd", 3, "cpu")
    assert 0 < timer._one(root) < 10
    with pytest.raises(compare.Unavailable, match="bertkd was imported from"):
        timer._one(tmp_path)


def test_a_termination_leaves_no_work_tree_behind(tmp_path):
    (tmp_path / "bertkd").mkdir()
    (tmp_path / "bertkd" / "file").write_text("x")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    program = f"""
import time
from pathlib import Path
from bertkd.bench.compare import checkout
with checkout(Path({str(tmp_path)!r}), "HEAD") as tree:
    print(tree, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as run:
        tree = Path(run.stdout.readline().strip())
        assert (tree / "bertkd" / "file").exists()
        run.terminate()
    assert run.returncode == 128 + signal.SIGTERM
    assert not tree.parent.exists()
    listed = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1
