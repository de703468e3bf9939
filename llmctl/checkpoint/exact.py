"""Floats in fewer bits, where that loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("float16", "bfloat16")


def exact_dtype(values: Tensor) -> str:
    """The first of float16, bfloat16 and float32 that holds every value (16- or 32-bit floats) as it is."""
    return next((dtype for dtype in _DTYPES if holds(values, dtype)), "float32")


def holds(values: Tensor, dtype: str) -> bool:
    """Whether a float dtype holds every value as it is."""
    import torch

    target = getattr(torch, dtype)
    return values.dtype == target or torch.equal(values.to(target).to(values.dtype), values)
