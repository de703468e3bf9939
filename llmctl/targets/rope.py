"""Rotary position embedding tables from a rope op's attributes, in numpy.

Formulas: RoFormer (Su et al. 2021); linear interpolation (Chen et al. 2023); Llama 3's frequency bands (Meta's
reference code); YaRN (Peng et al. 2023); LongRoPE (Ding et al. 2024). Constants and edge cases follow transformers'
``modeling_rope_utils``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def inverse_frequencies(attrs: Mapping[str, Any]) -> Floats:
    """Angle per position of each rotated pair, f64 [rotary_dim / 2].

    Raises:
        ValueError: unknown ``rope_type`` or a field that is missing.
    """
    dim = int(attrs["rotary_dim"])
    plain = 1.0 / np.power(float(attrs["theta"]), np.arange(0, dim, 2, dtype=np.float64) / dim)
    rope_type = attrs.get("rope_type", "default")
    try:
        if rope_type == "default":
            return plain
        if rope_type == "linear":
            return plain / float(attrs["factor"])
        if rope_type == "llama3":
            return _llama3(plain, attrs)
        if rope_type == "yarn":
            return _yarn(plain, attrs)
        if rope_type == "longrope":
            return plain / np.array(attrs["factors"], np.float64)
    except KeyError as error:
        raise ValueError(f"rope_type '{rope_type}' needs attribute {error}") from error
    raise ValueError(f"unknown rope_type '{rope_type}'")


def cos_sin_table(attrs: Mapping[str, Any], num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of every position's angles, f32 [num_positions, rotary_dim / 2], times the attention factor.

    The angle is the float32 product of position and float32 frequency, as in the models' training code; at long
    positions a more exact angle would be a different one.
    """
    frequencies = inverse_frequencies(attrs).astype(np.float32)
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * frequencies[None, :]
    wide = angles.astype(np.float64)
    factor = float(attrs.get("attention_factor", 1.0))
    return (np.cos(wide) * factor).astype(np.float32), (np.sin(wide) * factor).astype(np.float32)


def _llama3(plain: Floats, attrs: Mapping[str, Any]) -> Floats:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    factor, low, high = (float(attrs[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(attrs["original_max_position"])
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    banded = np.where(wavelength > original / low, plain / factor, between)
    return np.where(wavelength < original / high, plain, banded)


def _yarn(plain: Floats, attrs: Mapping[str, Any]) -> Floats:
    """Dimensions that turn fast are kept, slow ones interpolated, with a linear ramp between."""
    dim, theta, original = int(attrs["rotary_dim"]), float(attrs["theta"]), float(attrs["original_max_position"])

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(attrs["beta_fast"])), dimension(float(attrs["beta_slow"]))
    if attrs["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return plain / float(attrs["factor"]) * interpolated + plain * (1 - interpolated)
