"""Fixtures shared by all tests, and the interpreter for Triton kernels where there is no GPU."""

import os

import pytest
import torch

# Triton reads it when a kernel is decorated, so it has to stand before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element nobody wrote shows up in the result."""

    def poison(allocate):
        def run(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return run

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def on_cpu(monkeypatch):
    """Train on the CPU also where there is a GPU, for results to compare with."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fresh_compiler():
    """No graph of another test counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def process_group():
    """One process, for what asks for a group of them."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """A cache that has the standard library's docstrings, parsed once for all tests."""
    folder = tmp_path_factory.mktemp("docstrings")
    from bertkd.data import read_docstrings

    read_docstrings(cache_dir=folder)
    return folder


@pytest.fixture(scope="session")
def records(cache_dir):
    """The standard library's docstrings."""
    from bertkd.data import read_docstrings

    return read_docstrings(cache_dir=cache_dir)
