"""The targets that the kernels are to reach on an H200: what is expected of each on paper, and judged from
gpu_check's rows.

The paper's H200: 132 SMs at 1.75 GHz, 4.3 TB/s of copy bandwidth, 780 TFLOP/s of dense bf16 with wgmma (cuBLAS), of
which mma.sync reaches 60% and these kernels 50%; 5.5 to 7 TB/s from L2; 1 to 2 us from the start of a launch to full
bandwidth, which back-to-back launches hide in part. Bytes, operations and occupancy of each kernel are in the notes at
the head of its file; the expectations here follow from them, and are there to be proven wrong by the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_LARGE = ("gate_up 28672x4096", "down 4096x14336")
_ROWWISE = ("rms_norm", "add_rms_norm", "rope_kv", "silu_mul")


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        limit: what every row's value must reach; with ``most`` what none may exceed.
        expected: the figures that the design leads to, and why.
        rows, value: which of gpu_check's rows it is about, and what of each.
    """

    name: str
    limit: float
    expected: str
    rows: Callable[[Sequence[Any]], Sequence[Any]]
    value: Callable[[Any], float]
    most: bool = False


@dataclass(frozen=True)
class Verdict:
    """A target, what was found in the worst row, and whether that is enough; None when no row tells."""

    target: Target
    found: str
    reached: bool | None


def _copy(row: Any) -> float:
    return float(row.copy_share)


def _cublas(row: Any) -> float:
    return float(row.others["cuBLAS bf16"] / row.us)


def _sdpa(row: Any) -> float:
    return float(row.others["torch SDPA"] / row.us)


def _large(rows: Sequence[Any], most_rows: int) -> list[Any]:
    return [r for r in rows if r.kernel == "w4a16" and r.shape.endswith(_LARGE) and r.rows <= most_rows]


def targets(measured: Sequence[Any]) -> tuple[Target, ...]:
    """All of them; ``measured`` gives the times of one row, which others are held against."""
    one = {row.shape: row.us for row in _large(measured, 1)}
    return (
        Target(
            "w4a16, 1 row, 4096x14336 and larger: ≥ 80% of copy", 0.8,
            "gate_up 61.5 MB, 14.3 us of bytes + 1..2 of ramp: 88..93%; down 30.7 MB, 7.2 + 1..2 us: 78..88%, at risk",
            lambda rows: _large(rows, 1), _copy,
        ),
        Target(
            "w4a16 flat through 16 rows: ≤ 1.15 of 1 row's time", 1.15,
            "1.0 to 4 rows. Every tile of 32 rows reads all of x through L1: from L2 as many bytes as codes at 8 rows, "
            "2 at 16. gate_up: 5 blocks an SM share x in L1: 1.05..1.3. down: 128 blocks, one an SM, share nothing: "
            "8.6 TB/s from L2 at 8 rows, 1.3; 12.9 at 16, 2.0: MISSED unless a block takes two tiles",
            lambda rows: [r for r in _large(rows, 16) if r.shape in one], lambda r: float(r.us / one[r.shape]), True,
        ),
        Target(
            "w4a16 through 16 rows: ≥ 3 × cuBLAS bf16", 3.0,
            "cuBLAS reads 3.82 times the bytes (235 MB, 55 us and 117 MB, 27 us): 3.3..3.6 at 1 row, falling as the "
            "target above does: down at 16 rows 1.7",
            lambda rows: _large(rows, 16), _cublas,
        ),
        Target(
            "w4a16 never slower than cuBLAS bf16", 1.0,
            "gate_up: 2.8 at 32 rows, 1.4 at 64, 0.7 at 128 (77 us of mma.sync against 55), 0.5 at 256 (68 us of "
            "dequantising + cuBLAS), 0.8 at 1024, 0.95 at 4096: MISSED from 96 rows on without wgmma",
            lambda rows: [r for r in rows if r.kernel == "w4a16"], _cublas,
        ),
        Target(
            "decode attention, 32 x 8192: ≥ 85% of copy", 0.85,
            "1.07 GB of keys and values, 250 us of bytes, 284 us with the last wave and combine: 88%",
            lambda rows: [r for r in rows if r.kernel == "attention decode" and "32 x 8192, bfloat16" in r.shape],
            _copy,
        ),
        Target(
            "prefill attention: ≥ 60% of flash SDPA", 0.6,
            "8k, 32/8 heads: 550 GFLOP, 1.57 ms (45% of dense); flash attention 2 at 350..400 TFLOP/s: 0.88..1.0",
            lambda rows: [r for r in rows if r.kernel == "attention prefill" and "torch SDPA" in r.others], _sdpa,
        ),
        Target(
            "norms, rope, activation, 4096 rows: ≥ 80% of copy", 0.8,
            "rms_norm 4096: 67 MB, 15.6 us + 1..2: 89..94%; add_rms_norm 134 MB: 94%; silu_mul 352 MB: 97%; rope_kv "
            "101 MB, 23.4 us, too few bytes on their way: 70..90%, at risk",
            lambda rows: [r for r in rows if r.kernel in _ROWWISE and r.rows == 4096], _copy,
        ),
    )  # fmt: skip


def judge(rows: Sequence[Any]) -> list[Verdict]:
    """Every target with what was found."""
    return [_judged(target, target.rows(rows)) for target in targets(rows)]


def _judged(target: Target, rows: Sequence[Any]) -> Verdict:
    if not rows:
        return Verdict(target, "not measured", None)
    row = (max if target.most else min)(rows, key=target.value)
    found = target.value(row)
    reached = found <= target.limit if target.most else found >= target.limit
    return Verdict(target, f"{found:.2f} at {row.kernel} {row.shape}, {row.rows} rows", reached)
