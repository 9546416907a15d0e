"""``bertkd tune``: the fastest right configuration is stored, a wrong or failing one never."""

import json

import pytest
import torch

from bertkd.bench import tune
from bertkd.bench.timing import DeviceLost
from bertkd.cli.main import main
from bertkd.cli.tune import _change
from bertkd.ops import triton as kernels
from bertkd.ops.triton import config


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """A GPU by name only; the interpreter runs the kernels, and small candidates keep it short."""
    monkeypatch.setenv("BERTKD_TUNE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fast GPU 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    tried = [config.Config(32, 32, 4, 1), config.Config(16, 32, 4, 1), config.Config(16, 16, 4, 1)]
    monkeypatch.setattr(tune, "candidates", lambda *_: iter(tried))
    monkeypatch.setattr(tune, "HEADS", 1)
    monkeypatch.setattr(tune, "WORKLOADS", {"grad_rows": ("relation_kl", "fwd_bwd", 67)})
    return tmp_path / "Fast-GPU-9000.json"


def run(times):
    """Tune with a timer that gives ``times`` in turn, after running the kernel."""
    times = iter(times)

    def timer(call):
        call()
        return next(times)

    found = tune.tune([torch.float32], [16], ["grad_rows"], device="cpu", tokens=67, timer=timer)
    return list(found)


def test_the_fastest_is_stored(pretended_gpu):
    (found,) = run([2.0, 1.0, 1.5])
    assert found.config == config.Config(16, 32, 4, 1)
    assert json.loads(pretended_gpu.read_text()) == {"grad_rows/32/16": [16, 32, 4, 1]}
    assert config.read_tuned("Fast GPU 9000") == {"grad_rows/32/16": found.config}


def test_a_damaged_file_is_refused_before_anything_is_measured(pretended_gpu):
    pretended_gpu.write_text("{")
    with pytest.raises(
        ValueError, match=r"9000\.json holds no configurations .* Delete it; `bertkd tune`"
    ):
        run([])


def test_noise_stores_nothing(pretended_gpu):
    (found,) = run([1.0, 0.98, 1.2])
    assert not found.is_faster
    assert not pretended_gpu.exists()


def test_wrong_and_failing_candidates_are_out(pretended_gpu, monkeypatch):
    real = kernels.relation_kl_fwd_bwd

    def faulty(*args):
        used = config.lookup("grad_rows", args[1], args[3])
        if used.block_m == 16 and used.block_n == 32:
            raise RuntimeError("out of shared memory")
        loss, *grads = real(*args)
        return (loss * 2, *grads) if used.block_n == 16 else (loss, *grads)

    monkeypatch.setattr(kernels, "relation_kl_fwd_bwd", faulty, raising=False)
    (found,) = run([2.0, 0.1, 0.1])
    assert found.config == found.shipped


def test_where_the_shipped_one_fails_the_best_of_the_others_is_stored(pretended_gpu, monkeypatch):
    real = kernels.relation_kl_fwd_bwd

    def failing(*sizes):
        def run(*args):
            if config.lookup("grad_rows", args[1], args[3])[:2] in sizes:
                raise RuntimeError("out of shared memory")
            return real(*args)

        return run

    monkeypatch.setattr(kernels, "relation_kl_fwd_bwd", failing((32, 32)), raising=False)
    (found,) = run([2.0, 1.0])
    assert found.config == config.Config(16, 16, 4, 1)
    assert found.is_faster
    assert json.loads(pretended_gpu.read_text()) == {"grad_rows/32/16": [16, 16, 4, 1]}
    wrong = "(32, 32, 4, 1) wrong or does not run here -> (16, 16, 4, 1) 1.000 ms"
    assert _change(found) == wrong

    everything = failing((32, 32), (16, 32), (16, 16))
    monkeypatch.setattr(kernels, "relation_kl_fwd_bwd", everything, raising=False)
    said = []
    found = tune.tune([torch.float32], [16], ["grad_rows"], device="cpu", say=said.append)
    assert list(found) == []
    assert said == ["grad_rows/32/16: no configuration runs on this GPU and agrees with float64"]


def test_a_candidate_that_costs_the_device_ends_the_run(pretended_gpu, monkeypatch):
    def lost(device):
        raise DeviceLost(f"the GPU is lost to this process: {device}")

    def failing(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(tune, "check_device", lost)
    monkeypatch.setattr(kernels, "relation_kl_fwd_bwd", failing, raising=False)
    with pytest.raises(DeviceLost, match="cpu"):
        run([])


def test_what_a_budget_leaves_out_is_named(pretended_gpu, monkeypatch):
    clock = iter([0.0, 1000.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    said = []
    found = tune.tune([torch.float32], [16], device="cpu", budget_minutes=1, say=said.append)
    assert list(found) == []
    assert said == ["left out for want of time (1): grad_rows/32/16"]


def test_a_gpu_is_needed_and_options_are_checked(capsys):
    assert main(["tune", "--forms", "[grad_row]"]) == 2
    assert "unknown form 'grad_row'. Did you mean 'grad_rows'" in capsys.readouterr().err
    assert main(["tune", "--dtypes", "[int8]"]) == 2
    assert "unknown dtype 'int8'" in capsys.readouterr().err
    assert main(["tune", "--head_widths", "[200]"]) == 2
    assert "between 1 and 128, got 200" in capsys.readouterr().err
    for words, message in (
        (["--budget_minutes", "0"], "budget_minutes must be positive, got 0.0"),
        (["--budget_minutes", "-1"], "budget_minutes must be positive, got -1.0"),
        (["--head_widths", "[]"], "head_widths is empty"),
        (["--dtypes", "[]"], "dtypes is empty"),
    ):
        assert main(["tune", *words]) == 2
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["tune"]) == 2
        assert "no CUDA device was found" in capsys.readouterr().err


def test_every_form_has_a_workload():
    assert set(tune.WORKLOADS) == set(config.FORMS)
