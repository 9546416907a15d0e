"""What a step holds on a GPU, counted on a CPU: the design's targets, and a count that measured steps agree with."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bertkd.bench.record import read_rows
from bertkd.bench.step_models import PAIRS
from bertkd.bench.targets import TARGETS

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "nvidia-h200" / "results.csv"
STEPS = [t for t in TARGETS if t.device == "gpu" and t.mode == "step" and t.metric == "memory"]

peak_bytes = runpy.run_path(str(ROOT / "benchmarks" / "count_step_memory.py"))["peak_bytes"]


def shape(target):
    batch, length = target.shape.split()
    return int(batch[1:]), int(length[1:])


@pytest.mark.parametrize("target", STEPS, ids=lambda target: f"{target.op} {target.shape}")
def test_a_gpus_step_stays_within_the_share_of_eagers_memory(target):
    batch, length = shape(target)
    eager, ours = (peak_bytes(target.op, batch, length, eager=eager) for eager in (True, False))
    measured = [
        row.p50
        for row in read_rows(MEASURED)
        if (row.op, row.batch, row.length, row.impl) == (target.op, batch, length, "eager")
        and (row.kind, row.metric, row.padding) == ("step", "memory", "full")
    ]
    assert [eager / 2**20] == pytest.approx(measured, rel=0.01)
    assert ours <= target.factor * eager


@pytest.mark.parametrize(
    ("batch", "length", "words"), [(0, 8, "at least 1"), (1, 65, "at most 64")]
)
def test_sizes_that_no_step_has_are_refused(monkeypatch, batch, length, words):
    monkeypatch.setitem(PAIRS["tiny"].options, "max_position_embeddings", 64)
    with pytest.raises(ValueError, match=words):
        peak_bytes("tiny", batch, length, eager=True)


def test_the_targets_of_memory_are_those_two():
    assert [target.shape for target in STEPS] == ["B256 L128", "B32 L512"]
