"""attention_prefill under emulation, against torch in fp64 and in the same dtype."""

from __future__ import annotations

import pytest
import torch
from attention_case import HEADS_AND_FORMATS, TAGS_AND_CACHES, AttentionCase
from emulator import missing

from llmctl.targets.cuda.attention import BLOCK_SIZES, HEAD_DIMS, AttentionShape

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
FORMATS = pytest.mark.parametrize(("tag", "kv"), TAGS_AND_CACHES)
# Lengths and, of each, the rows that are new: whole prompts, chunks behind a prefix, single tokens.
LENGTHS, COUNTS = [1, 17, 33, 47, 130], [1, 17, 2, 31, 15]


def _check(shape: AttentionShape, lens, counts, **options) -> None:
    case = AttentionCase(shape, lens, counts, **options)
    case.check(case.prefill())


@HEADS_AND_FORMATS
def test_head_sizes_and_lengths_around_block_edges(tag, kv, head_dim):
    _check(AttentionShape(tag, kv, 2, 1, head_dim, 16), LENGTHS, COUNTS)


@FORMATS
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 2), (7, 1), (8, 1), (20, 1)])
def test_group_sizes(tag, kv, heads, kv_heads):
    _check(AttentionShape(tag, kv, heads, kv_heads, 64, 32), [40, 18], [23, 18])


@FORMATS
@pytest.mark.parametrize("window", [1, 16, 17, 33, 1000])
def test_windows(tag, kv, window):
    _check(AttentionShape(tag, kv, 4, 1, 64, 16), [150, 64, 17], [70, 1, 17], window=window)


@FORMATS
@pytest.mark.parametrize(("head_dim", "softcap"), [(128, 50.0), (64, 0.5), (256, 30.0)])
def test_soft_cap_with_a_window(tag, kv, head_dim, softcap):
    _check(AttentionShape(tag, kv, 2, 1, head_dim, 32), [33, 77], [33, 10], softcap=softcap, window=20)


@FORMATS
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_and_a_long_prefix(tag, kv, block_size):
    _check(AttentionShape(tag, kv, 3, 1, 64, block_size), [300, 3], [3, 3])


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("value_size", [1e-4, 0.0, 1e3])
def test_int8_values_of_any_size(tag, value_size):
    _check(AttentionShape(tag, "s8", 2, 1, 64, 16), [40, 70], [40, 9], value_size=value_size)


def test_more_sequences_than_a_warp_has_lanes():
    counts = [1 + i % 5 for i in range(70)]
    _check(AttentionShape("f16", "f16", 2, 1, 64, 16), [n + i % 7 for i, n in enumerate(counts)], counts)


def test_a_prompt_of_several_tiles():
    _check(AttentionShape("bf16", "bf16", 4, 1, 64, 16), [7, 100], [7, 100])


@FORMATS
def test_a_sequence_has_the_same_bits_in_any_batch(tag, kv):
    shape, lens, counts = AttentionShape(tag, kv, 2, 1, 64, 16), [37, 90, 20], [37, 40, 1]
    case = AttentionCase(shape, lens, counts)
    together = case.prefill()
    for i in range(3):
        alone = AttentionCase(shape, lens, counts)
        start, end = int(alone.starts[i]), int(alone.starts[i + 1])
        alone.lens, alone.counts, alone.tables = [lens[i]], [counts[i]], alone.tables[i : i + 1].contiguous()
        alone.q, alone.starts = alone.q[start:end].contiguous(), torch.tensor([0, counts[i]], dtype=torch.int32)
        assert torch.equal(alone.prefill(), together[start:end])


def test_single_rows_may_be_left_to_decode():
    case = AttentionCase(AttentionShape("f16", "f16", 4, 1, 64, 16), [40, 33, 70], [1, 5, 1])
    found = case.prefill(min_rows=2)
    assert not found[[0, 6]].any()
    case.check(found + case.decode(with_starts=True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_fits_the_smallest_device(head_dim):
    for kv in ("f16", "s8", "e4m3"):
        shape = AttentionShape("f16", kv, 8, 2, head_dim, 16)
        assert max(shape.prefill(3, 100).shared, shape.decode(3, 4).shared) <= 99 * 1024


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("window", [0, 37])
def test_prefill_sweep(tag, kv, head_dim, group, window):
    shape = AttentionShape(tag, kv, 2 * group, 2, head_dim, 32 if group == 4 else 16)
    softcap = 20.0 if group == 7 else 0.0
    _check(shape, [*LENGTHS, 65, 400], [*COUNTS, 65, 101], window=window, softcap=softcap)
