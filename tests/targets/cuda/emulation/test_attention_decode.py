"""attention_decode and attention_combine under emulation, against torch in fp64 and in the same dtype."""

from __future__ import annotations

import pytest
import torch
from attention_case import HEADS_AND_FORMATS, TAGS_AND_CACHES, AttentionCase
from emulator import missing

from llmctl.targets.cuda.attention import BLOCK_SIZES, HEAD_DIMS, AttentionShape, max_splits

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
FORMATS = pytest.mark.parametrize(("tag", "kv"), TAGS_AND_CACHES)
LENGTHS = [1, 15, 16, 17, 0, 31, 33, 300]


def _check(shape: AttentionShape, lens, split=256, **options) -> None:
    case = AttentionCase(shape, lens, **options)
    case.check(case.decode(split=split))


@HEADS_AND_FORMATS
def test_head_sizes_and_lengths_around_block_edges(tag, kv, head_dim):
    _check(AttentionShape(tag, kv, 4, 1, head_dim, 16), LENGTHS)


@FORMATS
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (3, 1), (7, 1), (16, 2), (20, 1), (34, 2)])
def test_group_sizes(tag, kv, heads, kv_heads):
    _check(AttentionShape(tag, kv, heads, kv_heads, 64, 32), [100, 18])


@FORMATS
@pytest.mark.parametrize("window", [1, 16, 17, 50, 64, 1000])
def test_windows(tag, kv, window):
    _check(AttentionShape(tag, kv, 4, 2, 64, 16), [1, 16, 50, 64, 81, 230], window=window)


@FORMATS
@pytest.mark.parametrize(("head_dim", "softcap"), [(128, 50.0), (64, 0.5), (256, 30.0)])
def test_soft_cap_with_a_window(tag, kv, head_dim, softcap):
    _check(AttentionShape(tag, kv, 2, 1, head_dim, 32), [33, 77], softcap=softcap, window=40)


@FORMATS
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("split", [16, 48, 128, 512])
def test_block_sizes_and_splits(tag, kv, block_size, split):
    _check(AttentionShape(tag, kv, 3, 1, 64, block_size), [150, 64, 3], split=split)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("value_size", [1e-4, 0.0, 1e3])
def test_int8_values_of_any_size(tag, value_size):
    _check(AttentionShape(tag, "s8", 4, 1, 64, 16), [1, 40, 100], value_size=value_size)


@pytest.mark.parametrize("kv", ["s8", "bf16"])
def test_large_scores(kv):
    case = AttentionCase(AttentionShape("bf16", kv, 2, 1, 64, 16), [90])
    case.q *= 30
    case.check(case.decode())


@FORMATS
def test_the_same_bits_alone_in_a_batch_and_in_any_grid(tag, kv):
    shape, lens = AttentionShape(tag, kv, 4, 2, 64, 16), [130, 17, 64, 199]
    case = AttentionCase(shape, lens, window=120)
    together = case.decode(max_context=512)
    assert torch.equal(together, case.decode(grid=1))
    for i, n in enumerate(lens):
        alone = AttentionCase(shape, lens, window=120)
        alone.lens, alone.counts, alone.tables = [n], [1], alone.tables[i : i + 1].contiguous()
        alone.q, alone.starts = alone.q[i : i + 1].contiguous(), alone.starts[:2].contiguous()
        assert torch.equal(alone.decode()[0], together[i])


def test_only_sequences_with_one_row_are_decoded():
    case = AttentionCase(AttentionShape("bf16", "bf16", 4, 1, 64, 16), [40, 33, 70, 9], [1, 5, 1, 9])
    found = case.decode(with_starts=True)
    assert not found[1:6].any()
    assert not found[7:].any()
    exact = torch.cat([case._attend(i, torch.float64, 0) for i in (0, 2)])
    assert (found[[0, 6]] - exact).abs().max() < 0.02


def test_splits_of_a_window():
    for window in (1, 2, 63, 64, 65, 200):
        for split in (16, 64):
            for context in (1, 64, 65, 500):
                counts = [-(-n // split) - max(0, n - window) // split for n in range(1, context + 1)]
                assert max(counts) <= max_splits(context, window, split)
    assert max_splits(1024, 0, 512) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tag": "f32"}, "f16 or bf16"),
        ({"kv_tag": "f16"}, "expected bf16, s8 or e4m3"),
        ({"head_dim": 72}, "head size 72"),
        ({"block_size": 24}, "block size 24"),
        ({"heads": 5}, "not a multiple of 2"),
    ],
)
def test_shapes_that_no_kernel_serves(change, reason):
    facts = {"tag": "bf16", "kv_tag": "bf16", "heads": 4, "kv_heads": 2, "head_dim": 64, "block_size": 16}
    with pytest.raises(ValueError, match=reason):
        AttentionShape(**{**facts, **change})


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("window", [0, 37])
def test_decode_sweep(tag, kv, head_dim, group, window):
    shape = AttentionShape(tag, kv, 2 * group, 2, head_dim, 32 if group == 4 else 16)
    _check(shape, [*LENGTHS, 255, 256, 257, 700], split=256, window=window, softcap=20.0 if group == 7 else 0.0)
