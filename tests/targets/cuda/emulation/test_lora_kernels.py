"""lora.cu under emulation: rows with different adapters, and none, against torch."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from machine import EmulatedMachine
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.targets.cuda.lora import lora_splits
from llmctl.targets.cuda.lora_signatures import add_adapters

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TAGS = pytest.mark.parametrize("tag", ["f16", "bf16"])
ADAPTERS = 4


class _Case:
    """x and y are slices of wider rows; y starts with values of its own."""

    def __init__(self, tag: str, rows: list[int], k: int, n: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(k + n + rank)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DTYPES[tag])

        self.tag, self.rows, self.k, self.n, self.rank = tag, rows, k, n, rank
        self.x, self.y = draw(len(rows), k + 8), draw(len(rows), n + 16)
        self.a, self.b = draw(ADAPTERS, rank, k), draw(ADAPTERS, n, rank)
        self.scales = torch.rand(ADAPTERS, generator=generator) + 0.5

    def launch(self, rows: slice = slice(None), slice_=128) -> tuple[torch.Tensor, torch.Tensor]:
        """h (NaN where nothing was written) and y, of some of the rows alone."""
        y, chosen = self.y[rows].clone(), self.rows[rows]
        h = torch.full((lora_splits(self.k, slice_), len(chosen), self.rank), torch.nan)
        add_adapters(
            EmulatedMachine(), self.tag, slice_, x=self.x[rows, : self.k], y=y[:, 8 : 8 + self.n], h=h, a=self.a,
            b=self.b, scales=self.scales, adapters=torch.tensor(chosen, dtype=torch.int32),
        )  # fmt: skip
        return h, y

    def check(self, h: torch.Tensor, y: torch.Tensor) -> None:
        """Rows with an adapter to torch's error; all else untouched."""
        own, cut = self.y[:, 8 : 8 + self.n], y[:, 8 : 8 + self.n]
        outside = torch.cat((self.y[:, :8], self.y[:, 8 + self.n :]), 1)
        assert torch.equal(torch.cat((y[:, :8], y[:, 8 + self.n :]), 1), outside)
        for i, adapter in enumerate(self.rows):
            if adapter < 0:
                assert h[:, i].isnan().all()
                assert torch.equal(cut[i], own[i])
                continue
            x, a, b = self.x[i : i + 1, : self.k], self.a[adapter], self.b[adapter]
            scale = self.scales[adapter].item()
            exact = own[i].double() + scale * (x.double() @ a.double().T @ b.double().T)[0]
            same = own[i] + ((x @ a.T) @ b.T)[0] * scale
            assert_as_good_as_torch(h[:, i].sum(0)[None], x.double() @ a.double().T, x @ a.T)
            assert_as_good_as_torch(cut[i], exact, same)


@TAGS
@pytest.mark.parametrize("rank", [8, 16, 24, 64])
@pytest.mark.parametrize(("k", "n"), [(8, 8), (96, 40), (264, 136)])
@pytest.mark.parametrize("rows", [[2], [-1, 3, 3, -1, 0], [0] * 17 + [1, 1, 2, -1, 0], [-1] * 16 + [1]])
def test_rows_get_their_own_adapter(tag, rank, k, n, rows):
    case = _Case(tag, rows, k, n, rank)
    case.check(*case.launch())


@TAGS
def test_a_decode_batch_of_all_adapters_and_several_slices(tag):
    case = _Case(tag, [i % 5 - 1 for i in range(35)], 512, 64, 16)
    case.check(*case.launch(slice_=64))


@TAGS
def test_no_adapters(tag):
    case = _Case(tag, [-1] * 20, 64, 64, 8)
    case.check(*case.launch())


@TAGS
def test_a_row_has_the_same_bits_in_any_batch(tag):
    case = _Case(tag, [i % 5 - 1 for i in range(20)], 320, 72, 32)
    h, y = case.launch()
    for i in range(20):
        alone_h, alone_y = case.launch(slice(i, i + 1))
        assert torch.equal(alone_y[0], y[i])
        assert torch.equal(alone_h[:, 0].nan_to_num(), h[:, i].nan_to_num())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"h": torch.zeros(2, 1, 8)}, "h has 2 splits; 64 columns"),
        ({"a": torch.zeros(1, 72, 64).half()}, "rank"),
        ({"a": torch.zeros(1, 12, 64).half(), "h": torch.zeros(1, 1, 12)}, "rank"),
        ({"adapters": torch.zeros(1)}, "adapters"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(change, reason):
    x, y, b = (torch.zeros(shape).half() for shape in ((1, 64), (1, 16), (1, 16, 8)))
    tensors = {
        "x": x, "y": y, "b": b, "a": torch.zeros(1, 8, 64).half(), "h": torch.zeros(1, 1, 8),
        "scales": torch.ones(1), "adapters": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=reason):
        add_adapters(EmulatedMachine(), "f16", **{**tensors, **change})
