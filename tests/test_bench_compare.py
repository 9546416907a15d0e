"""Two trees against each other: the verdict, turns, and a process for either."""

import ast
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bertkd import functional
from bertkd.bench import compare, ops_networks, runner
from bertkd.bench.cases import attention
from bertkd.bench.ops import SPECS
from bertkd.bench.spec import Inputs

SMALL = attention("relation_kl", (4, 3, 20, 8), "float32", padding="glue")


@pytest.mark.parametrize(
    ("base", "new", "word"),
    [
        ([1.00, 1.01, 0.99], [1.00, 1.02, 1.00], "same"),
        ([1.00, 1.01, 0.99], [1.25, 1.24, 1.26], "slower"),
        ([1.00, 1.01, 0.99], [0.80, 0.81, 0.79], "faster"),
        ([1.00, 1.40, 0.80], [1.20, 1.60, 1.00], "unclear"),
        # Half the distance between the percentiles of either side is noise: 0.085 in both.
        ([0.90, 1.00, 1.10], [1.08, 1.20, 1.32], "slower"),
        ([0.90, 1.00, 1.10], [0.79, 0.88, 0.97], "same"),
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


# What these modules take from the library as they are imported: every commit that one may want to compare with has it.
TAKEN = {
    "bertkd.compiling.compile_in_place",
    "bertkd.errors.unknown_name",
    "bertkd.functional",
    "bertkd.ops.implementations.IMPLS",
    "bertkd.ops.implementations.implementation",
    "bertkd.ops.implementations.unavailable",
    "bertkd.ops.native.library",
    "bertkd.ops.self_attention.self_attention",
    "bertkd.ops.verify.relative_error",
    "bertkd.study.files.write_text",
    "bertkd.study.memory.peak_extra_bytes",
}


def test_either_tree_needs_no_more_of_its_library_than_older_commits_have():
    """Both are timed by this package: a name that it imports and the base lacks would leave nothing to compare."""
    folder, left, taken = Path(compare.__file__).parent, ["compare_child"], set()
    seen = set()
    while left:
        seen.add(module := left.pop())
        for node in ast.parse((folder / f"{module}.py").read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("bertkd"):
                continue
            _, _, own = node.module.partition("bertkd.bench")
            names = [own[1:]] if own else [x.name for x in node.names]
            if node.module.startswith("bertkd.bench"):
                left += [n for n in names if n not in seen and (folder / f"{n}.py").exists()]
            else:
                taken |= {f"{node.module}.{name}" for name in names}
    assert taken == TAKEN


def test_either_tree_is_asked_with_no_more_options_than_older_commits_have(monkeypatch):
    asked = []

    def record(*tensors, **options):
        asked.append(sorted(options))
        return tensors[0]

    for name in ("relation_kl", "attention_mse", "value_relation_kl"):
        monkeypatch.setattr(functional, name, record)
    monkeypatch.setattr(ops_networks, "self_attention", record)
    inputs = Inputs([torch.ones(1, 1, 2, 2)] * 3, [torch.ones(1, 1, 2, 2)] * 2, None)
    pair = Inputs(inputs.student[:2], inputs.teacher, None)
    for op, given in (
        ("relation_kl", pair),
        ("self_relation_kl", pair),
        ("attention_mse", pair),
        ("self_attention", inputs),
        ("window_relation_kl", pair),
        ("window_self_attention", inputs),
    ):
        SPECS[op].call(given, "native")
    plain = ["impl", "reduction"]
    assert asked == [plain, plain, plain, [], [*plain, "window"], ["window"]]


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@localhost"]
    return subprocess.run([*command, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "bertkd").mkdir()
    (tmp_path / "bertkd" / "file").write_text("x")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        git(tmp_path, *words)
    return tmp_path


@contextmanager
def another_run(repository):
    program = f"""
import time
from pathlib import Path
from bertkd.bench.compare import checkout
with checkout(Path({str(repository)!r}), "HEAD") as tree:
    print(tree, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        tree = Path(run.stdout.readline().strip())
        assert (tree / "bertkd" / "file").exists()
        yield run, tree
        run.kill()


def test_a_termination_leaves_no_work_tree_behind(repository):
    with another_run(repository) as (run, tree):
        run.terminate()
        run.wait()
    assert run.returncode == 128 + signal.SIGTERM
    assert not tree.parent.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_the_next_run_removes_what_a_killed_one_left(repository):
    with another_run(repository) as (_, tree), compare.checkout(repository, "HEAD"):
        assert (tree / "bertkd" / "file").exists()  # at work
    assert tree.exists()
    with compare.checkout(repository, "HEAD"):
        assert not tree.parent.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_an_interruption_of_the_checkout_itself_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(command, **_):
        if "add" in command:
            raise KeyboardInterrupt
        return SimpleNamespace(stdout="")

    monkeypatch.setattr(subprocess, "run", interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), compare.checkout(tmp_path, "HEAD"):
        pass
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


SAME, SLOW = ([1.0] * 3, [1.0] * 3), ([1.0] * 3, [1.5] * 3)


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        ([SAME], 0, "same"),
        ([SLOW, SLOW], 1, "slower"),
        # A second look at what is in doubt: both looks count.
        ([([1.0] * 3, [1.2] * 3), ([1.0] * 9, [1.0] * 9)], 0, "same"),
        # Who compares nothing has not shown that nothing is slower.
        ([compare.Unavailable("base: too long")], 1, "skipped"),
        ([compare.Unavailable("new: off by 1", red=True)], 1, "red"),
    ],
)
def test_what_fails_a_comparison(answers, code, said, monkeypatch, capsys):
    left = list(answers)

    def pairs(self, base, new, count):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(compare.Timer, "pairs", pairs)
    args = SimpleNamespace(base="HEAD", pairs=3, rounds=3, device="cpu")
    jobs = [(SMALL, "chunked", "fwd")]
    assert compare._compare(jobs, Path("base"), Path("new"), args) == code
    assert left == []
    _, line, verdict = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == [said, SMALL.name.split()[0]]
    failed = "nothing was compared" if said == "skipped" else "1 red, or slower"
    assert verdict.startswith(failed if code else "nothing slower")


@pytest.mark.parametrize("tree", ["base", "new"])
def test_this_tree_must_run_what_the_base_can(tree, monkeypatch):
    def one(self, asked):
        if asked == tree:
            raise compare.Unavailable(f"{tree}: RuntimeError: broken")
        return 1.0

    monkeypatch.setattr(compare.Timer, "_one", one)
    with pytest.raises(compare.Unavailable, match="broken") as raised:
        compare.Timer(SMALL, "chunked", "fwd", 3, "cpu").pairs("base", "new", 3)
    assert raised.value.red == (tree == "new")


def test_only_what_an_op_has_is_compared(monkeypatch):
    jobs = []
    monkeypatch.setattr(compare, "checkout", lambda *_: nullcontext(Path()))
    monkeypatch.setattr(compare, "_compare", lambda found, *_: jobs.extend(found) or 0)
    select = "self_attention,L=128,mode=fwd"
    assert compare.main(["--base", "HEAD", "--device", "cpu", "--select", select]) == 0
    assert [impl for _, impl, _ in jobs] == ["native"]


def test_the_base_has_a_library_of_its_own_sources(tmp_path):
    """This tree's where they are the same; else one is built, by the base's own setup.py."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@localhost"]
    (tmp_path / "csrc").mkdir()
    (tmp_path / "bertkd").mkdir()
    (tmp_path / "bertkd" / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text("_C*\n")
    build = "import sys; open('bertkd/_C.built.so', 'w').write(' '.join(sys.argv[1:]))"
    (tmp_path / "setup.py").write_text(build)
    (tmp_path / "csrc" / "kernel.cpp").write_text("one")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "bertkd" / "_C.here.so").write_text("")

    def libraries():
        with compare.checkout(tmp_path, "HEAD") as tree:
            return [path.name for path in (tree / "bertkd").glob("_C*.so")]

    assert libraries() == ["_C.here.so"]
    (tmp_path / "csrc" / "kernel.cpp").write_text("two")
    assert libraries() == ["_C.built.so"]
    (tmp_path / "bertkd" / "_C.here.so").unlink()
    # A tree without native code is compared with one without.
    assert libraries() == []
