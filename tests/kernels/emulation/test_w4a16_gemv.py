"""w4a16_gemv.cu under emulation, against the dequantised product in fp32."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from machine import launch
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.kernels import reference
from llmctl.kernels.cuda_signatures import gemv_entry

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def _check(tag: str, m: int, n: int, k: int, group: int, symmetric: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(m * 1000 + n * 10 + k + group)
    groups = k // group
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    codes = torch.stack([packed & 15, packed >> 4], -1).view(n, k)
    scales = (torch.rand(n, groups, generator=generator) * 0.02 + 0.001).half()
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    x = torch.randn(m, k, generator=generator).to(DTYPES[tag])
    b = torch.randn(n, generator=generator).to(DTYPES[tag]) if bias else None
    y = torch.empty(m, n, dtype=DTYPES[tag])
    launch(
        gemv_entry(tag, m), x=x, codes=packed, scales=scales, zeros=None if symmetric else zeros, bias=b, y=y,
        group_size=group,
    )  # fmt: skip
    zeros = torch.full_like(zeros, 8) if symmetric else zeros
    w = reference.dequantize(codes, scales, zeros, torch.arange(k) // group)
    exact = x.double() @ w.double().T + (0 if b is None else b.double())
    same = reference.linear(x, w.to(x.dtype), b)
    assert_as_good_as_torch(y, exact, same)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "symmetric", "bias"),
    [
        (1, 1, 32, 32, False, False),
        (1, 7, 96, 32, False, True),
        (2, 5, 192, 64, True, True),
        (3, 9, 4224, 32, False, False),  # more than one round of the block's threads, off the tile
        (4, 6, 256, 256, False, True),
        (5, 3, 320, 64, True, False),
        (7, 11, 384, 128, False, True),
        (8, 2, 160, 160, True, True),
    ],
)
def test_gemv_equals_the_dequantised_product(tag, m, n, k, group, symmetric, bias):
    _check(tag, m, n, k, group, symmetric, bias)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("n", [1, 3, 17, 130])
@pytest.mark.parametrize(("k", "group"), [(32, 32), (224, 32), (576, 64), (4480, 128), (1120, 1120)])
def test_gemv_sweep(tag, m, n, k, group):
    _check(tag, m, n, k, group, symmetric=n == 3, bias=n != 17)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch(tag):
    k, n, group = 128, 4, 64
    x = torch.randn(4, k).to(DTYPES[tag])
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.rand(n, k // group).half()

    def run(rows: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(rows), n, dtype=rows.dtype)
        launch(gemv_entry(tag, len(rows)), x=rows, codes=packed, scales=scales, y=y, group_size=group)
        return y

    together = run(x)
    for i in range(4):
        assert torch.equal(run(x[i : i + 1].contiguous())[0], together[i])
