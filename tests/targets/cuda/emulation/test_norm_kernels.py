"""norm.cu under emulation, against targets/reference/kernels.py."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from machine import launch
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.targets.reference import kernels as reference

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
EPS = 1e-5
TAGS = pytest.mark.parametrize("tag", ["f16", "bf16"])
# One vector, off the block's first round, and more than one round a thread.
SHAPES = pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (3, 264), (7, 48), (2, 4104)])


def _inputs(tag: str, rows: int, hidden: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 10_000 + hidden)
    x = torch.randn(rows, hidden, generator=generator) * 3 + 0.5
    residual, w, b = (torch.randn(n, hidden, generator=generator) for n in (rows, 1, 1))
    return tuple(t.to(DTYPES[tag]) for t in (x, residual, w[0], b[0]))


def _norm(kind: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, plus_one: bool) -> torch.Tensor:
    return reference.rms_norm(x, w, EPS, plus_one) if kind == "rms" else reference.layer_norm(x, w, b, EPS)


@SHAPES
@TAGS
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("kind", "option"), [("rms", False), ("rms", True), ("layer", False), ("layer", True)])
def test_norm(tag, rows, hidden, kind, option, add):
    x, residual, w, b = _inputs(tag, rows, hidden)
    y, total = torch.empty_like(x), torch.empty_like(x)
    bias = b if option else None
    special = {"plus_one": int(option)} if kind == "rms" else {"b": bias}
    added = {"residual": residual, "sum": total} if add else {}
    launch(f"{'add_' if add else ''}{kind}_norm_{tag}", x=x, w=w, y=y, eps=EPS, **special, **added)
    summed = x + residual if add else x
    if add:
        assert torch.equal(total, summed)
    wide = (summed.float(), w.float(), None if bias is None else bias.float())
    exact = _norm(kind, *wide, option and kind == "rms")
    assert_as_good_as_torch(y, exact, _norm(kind, summed, w, bias, option and kind == "rms"))


@SHAPES
@TAGS
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_with_int8_output(tag, rows, hidden, kind, add):
    x, residual, w, b = _inputs(tag, rows, hidden)
    x[0] = 0
    residual[0] = 0
    b[:] = 0  # so that row 0 comes out as zeros: scale 0, codes 0
    q, scales, total = torch.empty(rows, hidden, dtype=torch.int8), torch.empty(rows), torch.empty_like(x)
    special = {"plus_one": 1} if kind == "rms" else {"b": b}
    added = {"residual": residual, "sum": total} if add else {}
    launch(f"{'add_' if add else ''}{kind}_norm_s8_{tag}", x=x, w=w, q=q, scales=scales, eps=EPS, **special, **added)
    exact = _norm(kind, (x + residual if add else x).float(), w.float(), b.float(), kind == "rms")
    torch.testing.assert_close(scales, exact.abs().amax(1) / 127, rtol=1e-5, atol=0)
    assert (q.float() * scales[:, None] - exact).abs().max() <= scales.max() * 0.501
    assert q[0].count_nonzero() == 0
    assert (q[1:].int().abs().amax(1) == 127).all()


@TAGS
def test_norm_in_place(tag):
    x, residual, w, _ = _inputs(tag, 3, 264)
    expected, total = reference.add_rms_norm(x, residual, w, EPS)
    launch(f"add_rms_norm_{tag}", x=x, residual=residual, w=w, y=x, sum=residual, eps=EPS, plus_one=0)
    assert torch.equal(residual, total)
    assert_as_good_as_torch(x, reference.rms_norm(total.float(), w.float(), EPS), expected)


@TAGS
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 1, 64), (3, 5, 80), (7, 3, 128), (2, 2, 256), (2, 1, 264)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_head_norm_of_a_slice_of_wider_rows(tag, rows, heads, head_dim, plus_one):
    generator = torch.Generator().manual_seed(heads)
    width, before = heads * head_dim + 24, 16
    x = torch.randn(rows, width, generator=generator).to(DTYPES[tag])
    w = torch.randn(head_dim, generator=generator).to(DTYPES[tag])
    y = torch.empty(rows, heads * head_dim, dtype=x.dtype)
    merged = x[:, before : before + heads * head_dim]
    options = {"w": w, "heads": heads, "eps": EPS, "plus_one": int(plus_one)}
    launch(f"head_rms_norm_{tag}", x=merged, y=y, **options)
    part = merged.reshape(rows, heads, head_dim)
    exact = reference.rms_norm(part.float(), w.float(), EPS, plus_one).view(y.shape)
    assert_as_good_as_torch(y, exact, reference.rms_norm(part, w, EPS, plus_one).view(y.shape))
    in_place = x.clone()
    merged = in_place[:, before : before + heads * head_dim]
    launch(f"head_rms_norm_{tag}", x=merged, y=merged, **options)
    assert torch.equal(in_place[:, before : before + y.shape[1]], y)
    assert torch.equal(in_place[:, :before], x[:, :before])
