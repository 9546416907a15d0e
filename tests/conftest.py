"""Fixtures shared by all tests."""

import pytest
import torch


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
