"""Which configuration a GPU gets: shipped for its architecture, tuned on it, and by the wider side. No GPU is asked."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bertkd.ops import triton
from bertkd.ops.triton import config

HALF, FULL = torch.float16, torch.float32


def heads(length=4, width=64, dtype=HALF):
    """As much of (B, H, L, D) on a GPU as is looked at."""
    device = torch.device("cuda", 0)
    return SimpleNamespace(shape=(2, 12, length, width), dtype=dtype, device=device, is_cuda=True)


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKD_TUNE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    config._on_device.cache_clear()
    yield
    config._on_device.cache_clear()


def test_the_wider_dtype_and_head_decide():
    narrow, wide, full = heads(width=32), heads(width=64), heads(width=32, dtype=FULL)
    for pair, bits, width in (
        ((narrow, narrow), 16, 32),
        ((narrow, wide), 16, 64),
        ((wide, narrow), 16, 64),
        ((full, narrow), 32, 32),
        ((narrow, full), 32, 32),
    ):
        assert config.lookup("grad_keys", *pair) == config.shipped("grad_keys", bits, width, 90)
    assert len({config.shipped("grad_keys", *x, 90) for x in ((16, 32), (16, 64), (32, 32))}) == 3
    too_wide = heads(width=128)
    with pytest.raises(KeyError, match="gram has no configuration for head width 128"):
        config.lookup("gram", too_wide, too_wide)


def test_what_was_tuned_comes_first_and_the_last_tuning_counts():
    key, x = config.tuned_key("rows", 16, 64), heads()
    for best in (config.Config(16, 16, 1, 1), config.Config(32, 16, 1, 1)):
        config.write_tuned("NVIDIA H200", {key: best})
        config._on_device.cache_clear()
        assert config.lookup("rows", x, x) == best
    assert config.lookup("grad_rows", x, x) == config.shipped("grad_rows", 16, 64, 90)


@pytest.mark.parametrize(
    ("length", "longest"),
    [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (128, 128), (129, None)],
)
def test_a_short_sequence_gets_the_smallest_form_that_holds_it(length, longest):
    x = heads(length)
    found = config.short_config("short", x, x)
    assert (found and found.block_n) == longest


@pytest.mark.parametrize(("value", "runs"), [("", False), ("0", False), ("1", True)])
def test_the_interpreter_runs_kernels_where_it_is_switched_on(value, runs, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.interpreting() == runs
    assert triton.unavailable() == (None if runs else "it needs a CUDA device")
