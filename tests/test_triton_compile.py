"""Every kernel compiles within its budget, for chips that need not be here; and the report notices when one does not.

In a process of its own: kernels that were decorated for the interpreter cannot be compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def report(cache, *arguments):
    """Exit status and lines of the report."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels_report"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "compiled" in result.stdout, result.stderr
    return result.returncode, result.stdout.splitlines()


def forms(lines, arch):
    """Op and form of the report's lines about an architecture."""
    found = (re.fullmatch(r"(\S+) +(.+?) +\S+ +\d+ +(\d+) .* ok", line) for line in lines)
    return {(row[1], row[2]) for row in found if row and int(row[3]) == arch}


COMMITTED = (ROOT / "docs" / "kernels-report.txt").read_text(encoding="utf-8").splitlines()
OPS = {op for op, _ in forms(COMMITTED, 90)}
RELATIONS = {op for op in OPS if op.endswith("relation_kl")}
OTHERS = OPS - RELATIONS


@pytest.mark.parametrize("ops", [RELATIONS, OTHERS], ids=["relations", "others"])
def test_kernels_are_within_their_budgets(ops, tmp_path):
    """One case of every form; `make kernels-report` compiles all of them, which takes a quarter of an hour."""
    status, lines = report(tmp_path, "--quick", "--arch", "80", "90", "--op", *sorted(ops))
    *rows, summary = lines[1:]
    assert status == 0, "\n".join(lines)
    assert all(row.endswith("ok") for row in rows)
    assert summary == f"{len(rows)} compiled, 0 over budget"
    wanted = {
        (op, form) for op, form in forms(COMMITTED, 90) if op in ops and "no mask" not in form
    }
    assert forms(rows, 90) == wanted
    assert forms(rows, 80)


def test_report_fails_on_every_kind_of_broken_budget(tmp_path):
    status, lines = report(tmp_path, "--cases", str(ROOT / "tests" / "kernels_over_budget.py"))
    verdicts = {line.split()[0]: line for line in lines[1:-1]}
    assert status == 1
    assert verdicts.pop("good").endswith("ok")
    expected = {
        "spills": r"spills \(\d+ bytes",
        "registers": r"\d+ registers, allowed 32",
        "shared": r"\d+ bytes of shared memory, allowed 1024",
        "tensor_cores": "  tensor-core instructions",
        "instructions": r"instructions a pair, allowed 1",
        "compiles_not": "does not compile",
    }
    assert set(verdicts) == set(expected)
    for op, reason in expected.items():
        assert re.search(reason, verdicts[op]), verdicts[op]
    assert lines[-1] == "7 compiled, 6 over budget"


def test_report_fails_where_there_is_nothing_to_report(tmp_path):
    status, lines = report(tmp_path, "--op", "no_such_op")
    assert status == 1
    assert lines[-1] == "0 compiled, 0 over budget"
