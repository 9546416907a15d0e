"""The native module's argument checks, choice of instruction set, and exponential."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ISAS, machine, needs_native

from bertkd import functional
from bertkd.ops import native
from bertkd.ops.native import library
from bertkd.ops.native.library import kernels
from bertkd.ops.tensors import heads, rows

pytestmark = needs_native

ATTENTION = ("relation_kl", "attention_mse")
TOO_FAR = 1 << 46  # elements; csrc/cpu/checks.cpp
TOO_MANY = (1 << 31) + 5


def bad_address(element):
    """Null, negative, and (where elements have a size) misaligned addresses."""
    odd = st.integers(1, 1 << 40).map(lambda n: n * element + 1)
    return st.one_of(st.just(0), st.integers(-(1 << 62), -1), odd)


bad_size = st.one_of(st.integers(-(1 << 62), -1), st.integers(TOO_MANY, 1 << 62))
bad_stride = st.one_of(st.integers(-(1 << 62), -1), st.integers(TOO_FAR, (1 << 63) - 1))
bad_dtype = st.one_of(st.integers(3, (1 << 31) - 1), st.integers(-(1 << 31), -1))
bad_scale = st.sampled_from([math.nan, math.inf, -math.inf, 1e300])
bad_probability = st.sampled_from([math.nan, math.inf, -0.125, 1.0, 2.0])
bad_threads = st.one_of(st.integers(-(1 << 31), 0), st.integers(4097, (1 << 31) - 1))


@st.composite
def bad_tensor(draw, good):
    """``good`` (address, dtype, width, strides) with one of its entries spoiled."""
    spoiled = list(good)
    field = draw(st.sampled_from(["address", "dtype", "width", "strides"]))
    if field == "address":
        spoiled[0] = draw(bad_address(4))
    elif field == "dtype":
        spoiled[1] = draw(bad_dtype)
    elif field == "width":
        spoiled[2] = draw(bad_size)
    elif isinstance(good[3], tuple):
        strides = list(good[3])
        strides[draw(st.integers(0, 2))] = draw(bad_stride)
        spoiled[3] = tuple(strides)
    else:
        spoiled[3] = draw(bad_stride)
    return tuple(spoiled)


def spoil(draw, args, kinds):
    """One argument replaced by something that must be refused, by what kind of argument it is."""
    where = draw(st.integers(0, len(args) - 1))
    kind, value = kinds[where], args[where]
    if kind == "tensor":
        bad = draw(bad_tensor(value))
    elif kind == "tensors":
        bad = [*value[:-1], draw(bad_tensor(value[-1]))]
    elif kind == "shape":
        bad = list(value)
        bad[draw(st.integers(0, 2))] = draw(bad_size)
        bad = tuple(bad)
    elif kind == "weight":
        bad = draw(st.one_of(
            bad_address(4).map(lambda a: (a, value[1])),
            bad_stride.map(lambda s: (value[0], (s, *value[1][1:]) if isinstance(value[1], tuple) else s)),
        ))  # fmt: skip
    elif kind == "mask":
        bad = draw(st.one_of(
            st.integers(-(1 << 62), 0).map(lambda a: (a, value[1])),
            bad_stride.map(lambda s: (value[0], (value[1][0], s))),
        ))  # fmt: skip
    else:
        simple = {
            "size": bad_size,
            "address": bad_address(4),
            "scale": bad_scale,
            "probability": bad_probability,
            "seed": st.integers(1 << 64, 1 << 80),
            "window": st.one_of(st.integers(-(1 << 62), -2), st.integers(TOO_MANY, 1 << 62)),
            "threads": bad_threads,
        }
        bad = draw(simple[kind])
    return [*args[:where], bad, *args[where + 1 :]]


def attention_arguments():
    tensors = [torch.randn(2, 2, 5, 3) for _ in range(6)]
    mask, weight, loss = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 2, 5), torch.empty(())
    keep = (*tensors, mask, weight, loss)
    args = [(2, 2, 5), (weight.data_ptr(), weight.stride()), *map(heads, tensors[:4]),
            (mask.data_ptr(), mask.stride()), 0.5, 0.5, loss.data_ptr(), *map(heads, tensors[4:]), 1, 2]  # fmt: skip
    kinds = ["shape", "weight", *["tensor"] * 4, "mask", "scale", "scale", "address",
             *["tensor"] * 2, "threads", "window"]  # fmt: skip
    return keep, args, kinds


def self_attention_arguments():
    tensors = [torch.randn(2, 2, 5, 3) for _ in range(8)]
    mask, stats = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 2, 5, 2)
    keep = (*tensors, mask, stats)
    args = [(2, 2, 5), *map(heads, tensors[:4]), (mask.data_ptr(), mask.stride()), 0.5, 0.25, 1,
            heads(tensors[4]), stats.data_ptr(), *map(heads, tensors[5:]), 1, 2]  # fmt: skip
    kinds = ["shape", *["tensor"] * 4, "mask", "scale", "probability", "seed",
             "tensor", "address", *["tensor"] * 3, "threads", "window"]  # fmt: skip
    return keep, args, kinds


def row_arguments(op):
    z_s, z_t, grad = (torch.randn(4, 6) for _ in range(3))
    weight, loss = torch.ones(4), torch.empty(())
    keep = (z_s, z_t, grad, weight, loss)
    if op == "softmax_kl":
        args = [
            4,
            (weight.data_ptr(), 1),
            rows(z_s),
            rows(z_t),
            1.0,
            loss.data_ptr(),
            rows(grad),
            1,
        ]
        kinds = ["size", "weight", "tensor", "tensor", "scale", "address", "tensor", "threads"]
    else:
        args = [
            4,
            (weight.data_ptr(), 1),
            *[[rows(x)] for x in (z_s, z_t, grad)],
            loss.data_ptr(),
            1,
        ]
        kinds = ["size", "weight", *["tensors"] * 3, "address", "threads"]
    return keep, args, kinds


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_spoiled_arguments_are_refused_and_never_crash(data):
    op = data.draw(st.sampled_from([*ATTENTION, "self_attention", "softmax_kl", "hidden_mse"]))
    if op == "self_attention":
        keep, args, kinds = self_attention_arguments()
        function = kernels().self_attention_bwd
    else:
        keep, args, kinds = attention_arguments() if op in ATTENTION else row_arguments(op)
        name = op if op == "hidden_mse" else f"{op}_fwd_bwd"
        function = getattr(kernels(), name)
    assert keep
    function(*args)
    with pytest.raises((ValueError, TypeError)) as error:
        function(*spoil(data.draw, args, kinds))
    assert str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, (0, 0, 3, (30, 15, 3)), "relation_kl: a_s is null"),
        (2, (4098, 0, 3, (30, 15, 3)), "relation_kl: a_s is not aligned to its element size of 4"),
        (3, (4096, 9, 3, (30, 15, 3)), "relation_kl: b_s has the unknown dtype code 9"),
        (4, (4096, 0, 7, (30, 15, 3)), "relation_kl: a_t and b_t must have one width, got 7 and 3"),
        (5, (4096, 1, 3, (30, -15, 3)), "relation_kl: b_t has the negative stride -15"),
        (10, (4096, 0, 3, (30, 15, 2)), "relation_kl: grad_a has rows that overlap"),
        (10, (4096, 1, 3, (30, 15, 3)), "relation_kl: a_s and grad_a must have one dtype"),
        (0, (2, 2, 1 << 31), "relation_kl: length must lie between 0 and 2147483647"),
        (12, 0, "relation_kl: threads must lie between 1 and 4096, got 0"),
        (7, math.nan, "relation_kl: scale_s must be finite"),
        (13, -2, "relation_kl: window must lie between -1 and 2147483647, got -2"),
    ],
)
def test_a_refusal_names_the_argument(place, value, message):
    keep, args, _ = attention_arguments()
    assert keep
    args[place] = value
    with pytest.raises(ValueError, match=message):
        kernels().relation_kl_fwd_bwd(*args)


def test_refusals():
    x = [torch.randn(1, 1, 4, 8)] * 4
    assert native.refusal("relation_kl", x) is None
    assert "no native kernel for hidden_cosine" in native.refusal("hidden_cosine", x)
    assert "float64" in native.refusal("relation_kl", [y.double() for y in x])
    assert "CPU" in native.refusal("relation_kl", [torch.empty(1, device="meta")])
    with pytest.raises(ValueError, match="float64"):
        functional.attention_kl(*[y.double() for y in x], impl="native")


@pytest.mark.parametrize("isa", ISAS)
def test_exponential_stays_within_its_bound(isa):
    x = torch.linspace(-100, 127, 1_000_003)
    x = torch.cat([x, torch.arange(-100, 128).float(), torch.linspace(-1, 1, 100_001)])
    out = torch.empty_like(x)
    with machine(isa):
        kernels().exp2(x.data_ptr(), out.data_ptr(), x.numel())
        exact = np.exp2(x.double().numpy())
        error = np.abs(out.double().numpy() - exact) / exact
        assert error.max() <= 2.0**-22
        whole = torch.arange(-100.0, 128.0)
        kernels().exp2(whole.data_ptr(), out.data_ptr(), whole.numel())
        assert np.array_equal(
            out[: whole.numel()].double().numpy(), np.exp2(whole.double().numpy())
        )
        low = torch.tensor([-100.0, -101.0, -1e4, -1e30, -math.inf])
        kernels().exp2(low.data_ptr(), out.data_ptr(), low.numel())
        assert (out[: low.numel()] == 2.0**-100).all()


# A GPU's NaN, a processor's, memory of all ones, a signalling one.
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -0x400000, -1, 0x7F800001])
@pytest.mark.parametrize("isa", ISAS)
def test_the_exponential_of_any_nan_is_nan(isa, bits):
    x = torch.full((40,), bits, dtype=torch.int32).view(torch.float32)
    out = torch.zeros(40)
    with machine(isa):
        kernels().exp2(x.data_ptr(), out.data_ptr(), 40)
        assert out.isnan().all()
        # A teacher's NaN is no finite loss.
        z_s, z_t = torch.randn(1, 100), torch.randn(1, 100)
        z_t[0, 7] = x[0]
        assert native.softmax_kl_rows(z_s, z_t, 1.0).isnan()


def test_instruction_set_can_be_chosen_and_a_wrong_one_is_refused():
    for isa in ISAS:
        with machine(isa):
            assert native.isa() == isa
    assert native.isa() == os.environ.get("BERTKD_CPU_ISA", ISAS[0])
    with pytest.raises(ValueError, match=f"'mmx' is not one.*{ISAS[0]}"):
        kernels().select_cpu_isa("mmx")


@pytest.mark.parametrize("isa", [*ISAS, "mmx"])
def test_instruction_set_from_the_environment(isa):
    code = "from bertkd.ops import native; print(native.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "BERTKD_CPU_ISA": isa},
    )
    if isa == "mmx":
        assert "BERTKD_CPU_ISA" in result.stderr
        assert "mmx" in result.stderr
    else:
        assert result.stdout.strip() == isa


def test_one_openmp_runtime_serves_torch_and_the_kernels():
    q, k = qkv(2, 4, 64, 16, seed=0)
    native.relation_kl_rows(q, k, q, k, None, 1.0, 1.0)
    torch.bmm(torch.randn(8, 64, 64), torch.randn(8, 64, 64))
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/maps")
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "torch/lib/libgomp" in line}
    with open("/proc/self/maps") as maps:
        system = {
            line.split()[-1] for line in maps if "/libgomp.so" in line and "torch" not in line
        }
    # Two runtimes would keep two pools of threads. torch builds without their own copy use the system's.
    assert not (loaded and system)


def test_kernels_run_in_many_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    student, teacher = qkv(2, 3, 90, 16, seed=0), qkv(2, 3, 90, 16, seed=1)
    weight = torch.ones(2, 3, 90)
    args = (weight, *student, *teacher, None, 0.25, 0.25)
    expected = native.relation_kl_fwd_bwd(*args)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: native.relation_kl_fwd_bwd(*args), range(40)):
            for got, want in zip(result, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_large_results_are_asked_for_in_large_pages():
    """What the system makes of the advice is its own business; that it was asked stands among the mapping's flags."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or "VmFlags" not in smaps.read_text() or "[never]" in _large_pages():
        pytest.skip("a system without large pages")
    large, small = (torch.empty(library.LARGE // 4 - less) for less in (0, 1))
    for x in (large, small):
        assert library.in_large_pages(x) is x
        x.fill_(1.0)
    assert [
        "hg" in _flags(smaps.read_text(), x.data_ptr() + (1 << 20)) for x in (large, small)
    ] == [
        True,
        False,
    ]


def _large_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text() if setting.exists() else "[never]"


def _flags(maps, address):
    """Flags of the mapping that holds an address."""
    inside = False
    for line in maps.splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


def test_large_pages_of_nothing_are_refused():
    with pytest.raises(ValueError, match="use_large_pages: data is null"):
        kernels().use_large_pages(0, 4096)
    with pytest.raises(ValueError, match="use_large_pages: bytes must not be negative"):
        kernels().use_large_pages(4096, -1)
    for address, size in ((4096 + 1, 0), (4096 + 1, 4095), (4096 + 1, 1)):  # no whole page
        kernels().use_large_pages(address, size)


def test_the_compiler_keeps_the_prefetches():
    """GCC drops calls of functions that only prefetch; nothing but time would tell."""
    objdump = shutil.which("objdump")
    if objdump is None or platform.machine() != "x86_64":
        pytest.skip("objdump cannot tell here")
    command = [objdump, "-d", kernels().__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # A loop for each tensor: relations 4, scores 2, attention 3 and 5, in three instruction sets.
    assert code.count("prefetch") >= 3 * (4 + 2 + 3 + 5)
