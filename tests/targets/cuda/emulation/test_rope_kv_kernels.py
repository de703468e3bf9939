"""rope_kv.cu under emulation, against targets/reference/kernels.py and targets/rope.py."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from machine import launch
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.targets.reference import kernels as reference
from llmctl.targets.rope import cos_sin_table

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TAGS = pytest.mark.parametrize("tag", ["f16", "bf16"])
# heads, kv_heads, head_dim, rotary_dim, style
LAYOUTS = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "style"),
    [
        (1, 1, 64, 64, "neox"),
        (3, 1, 128, 128, "neox"),
        (4, 2, 80, 32, "neox"),
        (2, 2, 96, 24, "neox"),
        (2, 1, 40, 20, "neox"),  # half of the rotary width is no whole vector
        (7, 1, 256, 256, "neox"),
        (4, 2, 64, 64, "gptj"),
        (2, 1, 256, 64, "gptj"),
    ],
)
SLOTS = torch.tensor([37, -1, 4, 16, -1, 15, 0])
NUM_SLOTS = 48


class _Case:
    """Seven tokens of a merged qkv row, two of them padding."""

    def __init__(self, tag, heads, kv_heads, head_dim, rotary_dim, style):
        generator = torch.Generator().manual_seed(heads * 1000 + head_dim + rotary_dim)
        self.heads, self.kv_heads, self.head_dim, self.style = heads, kv_heads, head_dim, style
        self.rotary_dim, self.tag = rotary_dim, tag
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv = (torch.randn(7, sum(widths) + 8, generator=generator) * 2).to(DTYPES[tag])
        self.q, self.k, self.v, _ = (t.contiguous() for t in self.qkv.split([*widths, 8], 1))
        self.parts = dict(zip("qkv", self.qkv[:, :-8].split(widths, 1), strict=True))
        self.positions = torch.tensor([0, 3, 99, 1, 50, 7, 64])
        attrs = {"rotary_dim": rotary_dim, "theta": 10_000.0}
        self.cos, self.sin = (torch.from_numpy(t) for t in cos_sin_table(attrs, 100))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (t[self.positions].to(x.dtype) for t in (self.cos, self.sin))
        return reference.rope(x, reference.rope_factors(cos, sin, self.style), self.head_dim, self.style)

    def launch(self, kv: str, q_out, caches, scales=(None, None), fixed=(1.0, 1.0)) -> None:
        launch(
            f"rope_kv_{self.tag}_{kv}", **self.parts, q_out=q_out, positions=self.positions, cosines=self.cos,
            sines=self.sin, slots=SLOTS, keys=caches[0], values=caches[1], key_scales=scales[0],
            value_scales=scales[1], heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            rotary_dim=self.rotary_dim, gptj=int(self.style == "gptj"), key_scale=fixed[0], value_scale=fixed[1],
        )  # fmt: skip

    def cache(self, dtype: torch.dtype, fill: float = 0) -> list[torch.Tensor]:
        return [torch.full((NUM_SLOTS, self.kv_heads, self.head_dim), fill).to(dtype) for _ in range(2)]

    def stored(self, cache: torch.Tensor) -> torch.Tensor:
        """Rows of the cache at the slots that are no padding; all others must be untouched."""
        kept = SLOTS[SLOTS >= 0]
        others = [i for i in range(NUM_SLOTS) if i not in kept.tolist()]
        assert (cache[others].float() == cache[others[0], 0, 0].float()).all()
        return cache[kept].flatten(1)


@LAYOUTS
@TAGS
def test_rope_and_kv_write(tag, heads, kv_heads, head_dim, rotary_dim, style):
    case = _Case(tag, heads, kv_heads, head_dim, rotary_dim, style)
    q_out = torch.empty_like(case.q)
    keys, values = case.cache(DTYPES[tag], 5)
    case.launch(tag, q_out, (keys, values))
    kept = SLOTS >= 0
    assert_as_good_as_torch(q_out, case.rotated(case.q.float()), case.rotated(case.q))
    assert_as_good_as_torch(case.stored(keys), case.rotated(case.k.float())[kept], case.rotated(case.k)[kept])
    assert torch.equal(case.stored(values), case.v[kept])


@LAYOUTS
@TAGS
def test_int8_cache_with_a_scale_per_head_and_token(tag, heads, kv_heads, head_dim, rotary_dim, style):
    case = _Case(tag, heads, kv_heads, head_dim, rotary_dim, style)
    case.qkv[0, heads * head_dim :] = 0  # a head of zeros has scale 0
    case.k[0] = case.v[0] = 0
    caches, scales = case.cache(torch.int8), [torch.zeros(NUM_SLOTS, kv_heads) for _ in range(2)]
    case.launch("s8", torch.empty_like(case.q), caches, scales)
    kept = SLOTS[SLOTS >= 0]
    for cache, scale, exact in zip(caches, scales, (case.rotated(case.k.float()), case.v.float()), strict=True):
        per_head = exact[SLOTS >= 0].view(len(kept), kv_heads, head_dim)
        torch.testing.assert_close(scale[kept], per_head.abs().amax(-1) / 127, rtol=1e-5, atol=0)
        restored = case.stored(cache).view(per_head.shape).float() * scale[kept][..., None]
        assert ((restored - per_head).abs() <= scale[kept][..., None] * 0.501).all()


@LAYOUTS
@TAGS
def test_fp8_cache_with_fixed_scales(tag, heads, kv_heads, head_dim, rotary_dim, style):
    case = _Case(tag, heads, kv_heads, head_dim, rotary_dim, style)
    caches = case.cache(torch.float8_e4m3fn)
    case.launch("e4m3", torch.empty_like(case.q), caches, fixed=(0.5, 0.002))
    kept = SLOTS >= 0
    exact = case.rotated(case.k.float())[kept] / 0.5
    found = case.stored(caches[0]).float()
    assert ((found - exact).abs() <= exact.abs() * 2**-4 + 2**-10).all()  # half a unit in the last of 3 bits
    clamped = (case.v.float()[kept] * (1 / torch.tensor(0.002))).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(case.stored(caches[1]).float(), clamped.float())  # values beyond 448 saturate


@TAGS
def test_only_the_cache_and_only_q_in_place(tag):
    case = _Case(tag, 2, 1, 64, 64, "neox")
    expected_q, expected_k = torch.empty_like(case.q), case.cache(DTYPES[tag])
    case.launch(tag, expected_q, expected_k)
    plain = case.cache(DTYPES[tag])
    numbers = {"head_dim": 64, "gptj": 0, "key_scale": 1.0, "value_scale": 1.0}
    launch(
        f"rope_kv_{tag}_{tag}", k=case.k, v=case.v, slots=SLOTS, keys=plain[0], values=plain[1], heads=0, kv_heads=1,
        rotary_dim=0, **numbers,
    )  # fmt: skip
    assert torch.equal(case.stored(plain[0]), case.k[SLOTS >= 0])
    assert torch.equal(case.stored(plain[1]), case.v[SLOTS >= 0])
    launch(
        f"rope_kv_{tag}_{tag}", q=case.q, q_out=case.q, positions=case.positions, cosines=case.cos, sines=case.sin,
        heads=2, kv_heads=0, rotary_dim=64, **numbers,
    )  # fmt: skip
    assert torch.equal(case.q, expected_q)
