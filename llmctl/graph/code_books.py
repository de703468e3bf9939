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
    # QLoRA (Dettmers et al. 2023), appendix E: of a normal distribution as many values lie nearest to each.
    "nf4": CodeBook(
        4,
        (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ),
    ),
    # bitsandbytes.functional.get_4bit_type: a sign and three bits.
    "fp4": CodeBook(4, tuple(sign * n / 12 for sign in (1, -1) for n in (0, 0.0625, 8, 12, 4, 6, 2, 3))),
}
"""By the name that a ``QuantScheme`` has for it."""
