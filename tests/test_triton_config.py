"""Which configuration a GPU gets: shipped for its architecture, tuned on it, and by the wider side. No GPU is asked."""

import ast
import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

from bertkd.ops import triton, verify
from bertkd.ops.triton import attention_mse, config, hidden_proj_mse, linear_kl

HALF, FULL = torch.float16, torch.float32


def heads(length=4, width=64, dtype=HALF):
    """As much of (B, H, L, D) on a GPU as is looked at."""
    device = torch.device("cuda", 0)
    shape = (2, 12, length, width)
    return SimpleNamespace(shape=shape, dtype=dtype, device=device, is_cuda=True, dim=lambda: 4)


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKD_TUNE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    config._on_device.cache_clear()
    yield
    config._on_device.cache_clear()


def test_tuned_configurations_lie_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    assert config.tuned_file("NVIDIA H200") == tmp_path / "NVIDIA-H200.json"
    monkeypatch.delenv("BERTKD_TUNE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.tuned_file("NVIDIA H200") == tmp_path / "xdg/bertkd/tune/NVIDIA-H200.json"


def test_a_home_that_is_missing_or_not_ones_own_costs_no_kernel(monkeypatch, tmp_path):
    x, no_home = heads(), RuntimeError("Could not determine home directory.")
    shipped = config.shipped("rows", 16, 64, 90)
    monkeypatch.delenv("BERTKD_TUNE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", Mock(side_effect=no_home))
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        assert config.tuned_file("NVIDIA H200").is_relative_to(tmp_path / f"bertkd-{os.getuid()}")
        assert config.lookup("rows", x, x) == shipped
    config._on_device.cache_clear()
    # What it finds where root's home is another user's.
    monkeypatch.setattr(os, "stat", Mock(side_effect=PermissionError(13, "Permission denied")))
    monkeypatch.setattr(io, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert config.lookup("rows", x, x) == shipped


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


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("widths", [(4, 4), (16, 16), (32, 16), (32, 64), (64, 64), (64, 128)])
def test_the_form_that_auto_checks_is_the_one_that_runs(widths, dtype):
    for length in [*range(1, 300), 470, 490, 620, 640, 641, 2048]:
        x, y = (heads(length, width, dtype) for width in widths)

        def checked(op, pair=(x, y)):
            small = verify._small_sizes(op, "triton", pair)
            assert small.widths == widths
            return small.length

        for form in ("short", "self_short"):
            small = heads(checked("relation_kl"), widths[0], dtype), y
            assert config.short_config(form, *small) == config.short_config(form, x, y)
        small = checked("attention_mse")
        assert attention_mse.gram_pays(small, *widths) == attention_mse.gram_pays(length, *widths)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("widths", [(16, 16), (32, 64), (40, 40), (64, 80), (128, 16), (128, 128)])
def test_gram_matrices_are_made_where_their_kernels_have_tiles(widths, capability):
    for form in ("gram", "gram_rows", "gram_grad"):
        tiles = [config.shipped(form, bits, max(widths), capability) for bits in (16, 32)]
        assert attention_mse.gram_pays(100_000, *widths) == (None not in tiles)


@pytest.mark.parametrize("op", ["hidden_proj_mse", "hidden_combine_mse"])
@pytest.mark.parametrize("rows", [1, 4095, 4096, 100_000])
def test_the_tile_that_auto_checks_is_the_one_that_runs(rows, op):
    states, weight = torch.empty(rows, 768, device="meta"), torch.empty(768, 768, device="meta")
    small = verify._small_sizes(op, "triton", [states, weight, states])
    tiles = [
        hidden_proj_mse.proj_config(n, 768, HALF, 8) for n in (small.batch * small.length, rows)
    ]
    assert tiles[0] == tiles[1]


@pytest.mark.parametrize("classes", [3, 1000, 30522, 250_002])
def test_the_chunks_that_auto_checks_are_like_those_that_run(classes):
    for rows in (1, 256, 257, 512, 513, 2198, 2199, 4096, 16_640, 70_000):
        states = torch.empty(rows, 768, device="meta")
        decoder = torch.empty(classes, 768, device="meta")
        sizes = verify._small_sizes("linear_kl", "triton", [states, decoder, states, decoder])
        small, step = sizes.batch * sizes.length, linear_kl.chunk_rows(classes)
        assert sizes.vocabulary == classes
        left_out = linear_kl.leaves_rows_out(rows, classes)
        assert linear_kl.leaves_rows_out(small, classes) == left_out
        if left_out:
            # As many have a weight in the check as are left out; several chunks stand for one too.
            small //= 2
            assert small > step
        else:
            assert (small > step) == (rows > step)


@pytest.mark.parametrize(("value", "runs"), [("", False), ("0", False), ("1", True)])
def test_the_interpreter_runs_kernels_where_it_is_switched_on(value, runs, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.interpreting() == runs
    assert triton.unavailable() == (None if runs else "it needs a CUDA device")


def test_every_launch_says_whether_products_and_sums_are_fused():
    """Triton's default changes with 3.10, and numerics and speed with it; what the report compiles says it too."""
    launches = []
    for path in Path(config.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches.append((path.name, node.lineno, {k.arg for k in node.keywords}))
    assert len(launches) > 10
    assert not [launch for *launch, names in launches if "enable_fp_fusion" not in names]
