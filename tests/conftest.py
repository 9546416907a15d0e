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
