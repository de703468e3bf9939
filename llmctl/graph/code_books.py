"""Code books: what the codes of a weight stand for where they are no integers, before the scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CodeBook:
    """A table of ``2**bits`` values, by code."""

    bits: int
    values: tuple[float, ...]


def _e4m3(code: int) -> float:
    """float8_e4m3fn: 4 bits of exponent (bias 7), 3 of mantissa, no infinity; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


CODE_BOOKS: Mapping[str, CodeBook] = {
    # OCP 8-bit floating point specification, E4M3.
    "fp8_e4m3": CodeBook(8, tuple(_e4m3(code) for code in range(256))),
}
"""By the name that a ``QuantScheme`` has for it."""
