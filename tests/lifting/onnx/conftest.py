"""What the tests of reading ONNX files share."""

from __future__ import annotations

import builtins

import pytest


@pytest.fixture
def without_onnxruntime(monkeypatch):
    """Let ONNX Runtime seem not to be installed."""
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
