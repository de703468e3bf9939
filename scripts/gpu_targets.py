"""The targets that the kernels are to reach on an H200, judged from gpu_check's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Judged = tuple[str, str, bool | None]
"""Target, what was found, whether it is reached; None when no row tells."""

_LARGE = ("gate_up 28672x4096", "down 4096x14336")
_ROWWISE = ("rms_norm", "add_rms_norm", "rope_kv", "silu_mul")


def judge(rows: Sequence[Any]) -> list[Judged]:
    """Every target with what was found."""
    linear = [row for row in rows if row.kernel == "w4a16"]
    large = [row for row in linear if row.shape.endswith(_LARGE)]
    small = {row.shape: row.us for row in large if row.rows == 1}
    decode = [row for row in rows if row.kernel == "attention decode" and "32 x 8192, bfloat16" in row.shape]
    prefill = [row for row in rows if row.kernel == "attention prefill" and "torch SDPA" in row.others]
    rowwise = [row for row in rows if row.kernel in _ROWWISE and row.rows == 4096]
    flat = [row for row in large if row.rows <= 16 and row.shape in small]
    return [
        _least("w4a16, 1 row, 4096x14336 and larger: ≥ 80% of copy", [r for r in large if r.rows == 1], _copy, 0.8),
        _most("w4a16 flat through 16 rows: ≤ 1.15 of 1 row's time", flat, lambda r: r.us / small[r.shape], 1.15),
        _least("w4a16 through 16 rows: ≥ 3 × cuBLAS bf16", [r for r in large if r.rows <= 16], _cublas, 3.0),
        _least("w4a16 never slower than cuBLAS bf16", linear, _cublas, 1.0),
        _least("decode attention, 32 x 8192: ≥ 85% of copy", decode, _copy, 0.85),
        _least("prefill attention: ≥ 60% of SDPA", prefill, lambda r: r.others["torch SDPA"] / r.us, 0.6),
        _least("norms, rope, activation, 4096 rows: ≥ 80% of copy", rowwise, _copy, 0.8),
    ]


def _copy(row: Any) -> float:
    return row.copy_share


def _cublas(row: Any) -> float:
    return row.others["cuBLAS bf16"] / row.us


def _least(target: str, rows: Sequence[Any], value: Callable[[Any], float], limit: float) -> Judged:
    return _judged(target, rows, value, min, lambda found: found >= limit)


def _most(target: str, rows: Sequence[Any], value: Callable[[Any], float], limit: float) -> Judged:
    return _judged(target, rows, value, max, lambda found: found <= limit)


def _judged(
    target: str, rows: Sequence[Any], value: Callable[[Any], float], worst: Callable[..., Any],
    reached: Callable[[float], bool],
) -> Judged:  # fmt: skip
    if not rows:
        return target, "not measured", None
    row = worst(rows, key=value)
    return target, f"{value(row):.2f} at {row.kernel} {row.shape}, {row.rows} rows", reached(value(row))
