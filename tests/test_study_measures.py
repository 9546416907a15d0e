"""Latency and peak memory, measured on work whose figures are known."""

import time

import pytest
import torch

from bertkd.study.latency import measure_latency
from bertkd.study.memory import peak_extra_bytes


def test_latency_takes_turns_and_the_median():
    calls = []

    def fast():
        calls.append("fast")

    def slow():
        calls.append("slow")
        # One outlier in five must not move the median.
        time.sleep(0.3 if len(calls) == 6 else 0.005)

    latency = measure_latency({"fast": fast, "slow": slow}, rounds=5, warmup=1)
    assert calls == ["fast", "slow"] * 6
    assert latency.seconds["fast"] < 0.003 < latency.seconds["slow"] < 0.05
    assert latency.threads == torch.get_num_threads()
    assert latency.device == "cpu"
    with pytest.raises(ValueError, match="something to run"):
        measure_latency({})


def test_peak_extra_bytes_sees_the_peak_not_the_sum(capfd):
    x = torch.randn(256, 1024)

    def work():
        y = x * 2
        z = y + 1
        del y
        return (z * 3).sum()

    # Two tensors of x's size live at once, though three are made.
    assert 2 * x.nbytes <= peak_extra_bytes(work) < 2 * x.nbytes + 4096
    assert capfd.readouterr().err == ""
