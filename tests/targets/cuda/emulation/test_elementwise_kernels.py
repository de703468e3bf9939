"""elementwise.cu under emulation, against targets/reference/kernels.py."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from machine import launch
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.targets.reference import kernels as reference

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TAGS = pytest.mark.parametrize("tag", ["f16", "bf16"])
SHAPES = pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 264), (7, 1000)])
FUNCTIONS = pytest.mark.parametrize("fn", list(reference.ACTIVATIONS))


def _random(tag: str, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 4
    x.view(-1)[:2] = torch.tensor([-100.0, 100.0])
    return x.to(DTYPES[tag])


@SHAPES
@TAGS
@FUNCTIONS
def test_gated_activation(tag, fn, rows, width):
    x, y = _random(tag, rows, 2 * width), torch.empty(rows, width, dtype=DTYPES[tag])
    launch(f"{fn}_mul_{tag}", x=x, y=y)

    def gated(x: torch.Tensor) -> torch.Tensor:
        return reference.act(x[:, :width], fn) * x[:, width:]

    assert_as_good_as_torch(y, gated(x.float()), gated(x))


@SHAPES
@TAGS
@FUNCTIONS
def test_activation_in_place(tag, fn, rows, width):
    x = _random(tag, rows, width)
    y = x.clone()
    launch(f"act_{fn}_{tag}", x=y, y=y)
    assert_as_good_as_torch(y, reference.act(x.float(), fn), reference.act(x, fn))


@SHAPES
@TAGS
def test_sum_and_product_round_as_torch(tag, rows, width):
    x, y = _random(tag, rows, width), _random(tag, rows, width).flip(1).contiguous()
    for name, expected in (("add", x + y), ("mul", x * y)):
        z = torch.empty_like(x)
        launch(f"{name}_{tag}", x=x, y=y, z=z)
        assert torch.equal(z, expected)


@TAGS
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_embedding_rows_and_positions(tag, scale):
    w = _random(tag, 11, 264)
    ids = torch.tensor([10, 0, 3, 3, 7])
    y, z = torch.empty(5, 264, dtype=w.dtype), torch.empty(5, 264, dtype=w.dtype)
    launch(f"embed_{tag}", ids=ids, w=w, y=y, scale=scale)
    assert torch.equal(y, reference.embed(ids, w, scale))
    positions = torch.tensor([0, 1, 2, 0, 8])
    launch(f"pos_embed_{tag}", x=y, positions=positions, w=w, z=z, offset=2)
    assert torch.equal(z, reference.pos_embed(y, positions, w, 2))
