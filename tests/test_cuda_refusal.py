"""What impl="cuda" says where it cannot run: decided from sizes, strides and the build's record, without a GPU."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bertkd import _build, functional
from bertkd.ops import cuda
from bertkd.ops.cuda import library, limits

RECORD = {
    "parts": ["cpu", "cuda"],
    "missing": {},
    "compiler": "g++ 12",
    "isa": ["avx2", "avx512"],
    "machine": "x86_64",
    "python": sys.implementation.cache_tag,
    "nvcc": "13.0.88",
    "cuda_archs": ["80", "90a", "100"],
    "cuda_ptx": "100",
}


class OnGpu:
    """Shape, strides and address of a CPU tensor that claims to be on a GPU."""

    is_cuda = True
    device = SimpleNamespace(index=0)

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.fixture
def on_gpu(monkeypatch):
    """A build for some architectures, and a GPU of ``capability`` with ``shared`` bytes a block."""

    def set_up(capability=(9, 0), shared=232448, record=RECORD):
        library_stub = SimpleNamespace(
            shared_limit=lambda index: shared,
            relation_kl_shared_bytes=lambda length, s, t, itself, backward: 4 * length * (s + t),
        )
        monkeypatch.setattr(limits, "kernels", lambda: library_stub)
        monkeypatch.setattr(_build, "record", lambda: record)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        for cached in (limits._unserved, limits._shared_limit, limits._shared_bytes):
            cached.cache_clear()

    set_up()
    yield set_up
    for cached in (limits._unserved, limits._shared_limit, limits._shared_bytes):
        cached.cache_clear()


def heads(shape=(2, 3, 40, 64), dtype=torch.bfloat16):
    return torch.zeros(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)


def refusal(op, *tensors):
    return cuda.refusal(op, [OnGpu(x) for x in tensors])


def test_what_fits_is_taken(on_gpu):
    assert refusal("relation_kl", *[heads()] * 4) is None
    assert refusal("self_relation_kl", heads(), heads((2, 3, 40, 16))) is None
    assert refusal("softmax_kl", torch.zeros(4, 7), torch.zeros(4, 7).half()) is None
    assert refusal("hidden_mse", *[torch.zeros(4, 9)[:, :7]] * 2) is None


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([heads(dtype=torch.float32)] * 4, "float16 and bfloat16, not float32"),
        ([heads(), heads(), heads(dtype=torch.float16)], "one dtype"),
        ([heads((1, 1, 129, 64))] * 4, "128 tokens, got 129"),
        ([heads((1, 1, 9, 20))] * 4, "multiples of 8 from 16 to 128, got 20"),
        ([heads((1, 1, 9, 136))] * 4, "got 136"),
        ([heads((1, 1, 9, 8))] * 4, "got 8"),
        ([heads((65536, 1, 1, 16))] * 4, "65535 sequences"),
        ([torch.zeros(1, 1, 9, 36, dtype=torch.half)[..., :32]] * 4, "16-byte.*contiguous"),
        ([torch.zeros(297, dtype=torch.half)[9:].view(1, 1, 9, 32)] * 4, "16-byte"),
        ([torch.zeros(1, 1, 32, 16, dtype=torch.half).transpose(2, 3)] * 4, "16-byte"),
    ],
)
def test_relations_it_cannot_run(tensors, said, on_gpu):
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refusal("relation_kl", *tensors))


def test_other_refusals(on_gpu):
    assert "float64" in refusal("softmax_kl", torch.zeros(2, 2).double())
    assert "not contiguous" in refusal("softmax_kl", *[torch.zeros(7, 4).T] * 2)
    assert refusal("linear_kl") == "there is no CUDA kernel for linear_kl"
    assert "got one on cpu" in cuda.refusal("softmax_kl", [torch.zeros(2, 2)])
    on_gpu(shared=1000)
    assert "needs 20480 bytes of shared memory, this GPU has 1000" in refusal(
        "relation_kl", *[heads()] * 4
    )


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),
        ((12, 0), True),
    ],
)
def test_gpus_that_a_build_serves(capability, served, on_gpu):
    on_gpu(capability=capability)
    reason = refusal("softmax_kl", torch.zeros(2, 2))
    assert (reason is None) == served
    if not served:
        assert reason == "its kernels need a GPU of sm_80 or newer, this one is sm_75"


@pytest.mark.parametrize(("arch", "served"), [("100", True), ("100a", False), ("100f", True)])
def test_which_later_gpus_code_without_ptx_serves(arch, served, on_gpu):
    on_gpu(capability=(10, 3), record=RECORD | {"cuda_archs": [arch], "cuda_ptx": None})
    assert (refusal("softmax_kl", torch.zeros(2, 2)) is None) == served


def test_without_ptx_a_newer_gpu_is_not_served(on_gpu):
    for capability, served in (((9, 0), True), ((9, 1), False), ((10, 0), False)):
        on_gpu(
            capability=capability, record=RECORD | {"cuda_archs": ["80", "90a"], "cuda_ptx": None}
        )
        reason = refusal("softmax_kl", torch.zeros(2, 2))
        assert (reason is None) == served
    assert "built for sm_80, 90a, this GPU is sm_100" in reason
    assert "BERTKD_CUDA_ARCHS=100" in reason


@pytest.fixture
def unavailable(monkeypatch):
    def answer(loaded, has_gpu=True):
        monkeypatch.setattr(library, "_load", lambda: loaded)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        return library.unavailable.__wrapped__()

    return answer


def test_why_it_is_unavailable(unavailable):
    module = SimpleNamespace(runtime_version=lambda: 13000, driver_version=lambda: 12040)
    assert unavailable((None, "not built: because")) == "not built: because"
    assert unavailable((module, None), has_gpu=False) == "no CUDA device was found"
    said = unavailable((module, None))
    assert "built with CUDA 13.0, and the driver serves up to 12.4" in said
    assert "update the driver" in said
    module.driver_version = lambda: 13020
    assert unavailable((module, None)) is None


def test_a_module_without_its_cuda_part(monkeypatch):
    monkeypatch.setattr(_build, "missing", lambda part: None)
    monkeypatch.setattr(library.importlib, "import_module", lambda name: SimpleNamespace())
    library._load.cache_clear()
    try:
        assert "without CUDA" in library.unavailable.__wrapped__()
        with pytest.raises(RuntimeError, match="built without CUDA"):
            library.kernels()
    finally:
        library._load.cache_clear()


def test_the_record_for_people(tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "_build.py"))
    _build.record.cache_clear()
    try:
        assert _build.missing("cuda").startswith("bertkd runs from a source tree")
        (tmp_path / "_build_info.json").write_text(json.dumps(RECORD))
        _build.record.cache_clear()
        assert _build.missing("cpu") is None
        assert _build.lost() == "its file is gone (reinstall bertkd)"
        assert _build.lines() == [
            "cpu: built by g++ 12 for x86_64, portable, avx2, avx512",
            "cuda: built by nvcc 13.0.88 for sm_80, sm_90a, sm_100 and, from PTX, newer than sm_100",
        ]
        elsewhere = RECORD | {"python": "cpython-27"}
        (tmp_path / "_build_info.json").write_text(json.dumps(elsewhere))
        _build.record.cache_clear()
        assert _build.lost().startswith(f"it was built for cpython-27, this is {RECORD['python']}")
        lacking = RECORD | {"parts": ["cpu"], "missing": {"cuda": "nvcc was not found"}}
        (tmp_path / "_build_info.json").write_text(json.dumps(lacking))
        _build.record.cache_clear()
        assert _build.missing("cuda") == "nvcc was not found"
        assert _build.lines()[1] == "cuda: not built: nvcc was not found"
    finally:
        _build.record.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_public_losses_say_so_too():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run .*Use impl='auto' or 'chunked'"):
        functional.attention_kl(q, q, q, q, impl="cuda")
