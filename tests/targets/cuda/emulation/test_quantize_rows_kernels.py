"""quantize_rows.cu under emulation, against the activation in fp32."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from machine import launch
from tolerance import DTYPES

from llmctl.targets.reference import kernels as reference

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 264), (7, 2056)])
@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("fn", [None, *reference.ACTIVATIONS])
def test_rows_in_int8_with_their_scales(tag, fn, rows, width):
    x = torch.randn(rows, width * (2 if fn else 1), generator=torch.Generator().manual_seed(width)) * 3
    x[-1] = 0 if rows > 1 else x[-1]
    x = x.to(DTYPES[tag])
    q, scales = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    name = f"{fn}_mul_s8" if fn else "quantize_s8"
    launch(f"{name}_{tag}", x=x, q=q, scales=scales)
    wide = x.float()
    exact = reference.act(wide[:, :width], fn) * wide[:, width:] if fn else wide
    torch.testing.assert_close(scales, exact.abs().amax(1) / 127, rtol=1e-5, atol=0)
    assert ((q.float() * scales[:, None] - exact).abs() <= scales[:, None] * 0.501).all()
    if rows > 1:
        assert q[-1].count_nonzero() == 0
