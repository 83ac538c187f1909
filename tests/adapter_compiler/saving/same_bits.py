"""Comparing states bit for bit."""

from __future__ import annotations

from typing import Any

import torch


def assert_same_bits(found: Any, expected: Any, where: str = "") -> None:
    """Raise unless nested states have equal tensors (bits, dtypes, shapes) in equal places, and are otherwise equal."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert found.layout == expected.layout, where
        if expected.layout == torch.sparse_coo:
            found, expected = ([t._indices(), t._values(), t.is_coalesced()] for t in (found, expected))
            assert_same_bits(found, expected, where)
            return
        assert _bits(found) == _bits(expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same_bits(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same_bits(found[i], value, f"{where}.{i}")
    else:
        assert found == expected or (found != found and expected != expected), where


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
