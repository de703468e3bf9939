"""AutoAWQ's GEMM layout: golden words, round trips, an independent reader, AutoAWQ itself where installed."""

import numpy as np
import pytest
import torch
from checkpoint_samples import random_weight, same_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.checkpoint import awq
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme


def independent_dequantize(qweight, qzeros, scales, group: int) -> np.ndarray:
    """Scalar by scalar from the published layout: nibble i of word c is column 8c + [0,2,4,6,1,3,5,7][i]; [K, N]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    out = np.zeros(scales.shape[0] * group * scales.shape[1], np.float32).reshape(-1, scales.shape[1])
    for k in range(out.shape[0]):
        for c in range(qweight.shape[1]):
            word, zero = int(qweight[k, c]) & 0xFFFFFFFF, int(qzeros[k // group, c]) & 0xFFFFFFFF
            for i in range(8):
                n = 8 * c + order[i]
                difference = ((word >> (4 * i)) & 15) - ((zero >> (4 * i)) & 15)
                out[k, n] = difference * np.float32(scales[k // group, n])
    return out


def test_golden_words() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 2)  # output n has code n
    weight = QuantizedWeight(
        codes, torch.ones(8, 1).half(), (15 - torch.arange(8, dtype=torch.uint8))[:, None], QuantScheme(4, -1, False)
    )
    planes = awq.pack(weight)
    # Nibbles from the low end: columns 0 2 4 6 1 3 5 7.
    assert [w & 0xFFFFFFFF for w in planes["qweight"].flatten().tolist()] == [0x75316420] * 2
    assert [w & 0xFFFFFFFF for w in planes["qzeros"].flatten().tolist()] == [0x8ACE9BDF]
    assert planes["scales"].dtype == torch.float16


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([8, 24, -1]), st.integers(0, 99))
def test_round_trip(eights: int, groups: int, group: int, seed: int) -> None:
    weight = random_weight(8 * eights, groups * (24 if group == -1 else group), group=group, seed=seed)
    planes = awq.pack(weight)
    assert {k: (str(v.dtype), tuple(v.shape)) for k, v in planes.items()} == {
        k: ({"I32": "torch.int32", "F16": "torch.float16"}[dtype], shape)
        for k, (dtype, shape) in awq.plane_specs(weight.shape, weight.scheme).items()
    }
    assert same_weight(awq.unpack(planes, group), weight)


def test_independent_reader_gets_the_same_weight() -> None:
    weight = random_weight(16, 48, group=16)
    planes = {name: plane.numpy() for name, plane in awq.pack(weight).items()}
    found = independent_dequantize(planes["qweight"], planes["qzeros"], planes["scales"], 16)
    np.testing.assert_array_equal(found.T, weight.dequantize().numpy())


def test_autoawq_gets_the_same_weight() -> None:
    packing = pytest.importorskip("awq.utils.packing_utils", reason="autoawq is not installed", exc_type=ImportError)
    weight = random_weight(32, 64, group=32)
    planes = awq.pack(weight)
    found = packing.dequantize_gemm(planes["qweight"], planes["qzeros"], planes["scales"], 4, 32)
    assert torch.equal(found.T.float(), weight.dequantize(torch.float16).float())


def test_symmetric_claim_is_checked() -> None:
    planes = awq.pack(random_weight(8, 32))
    with pytest.raises(ValueError, match="zero points are not all 8"):
        awq.unpack(planes, 32, symmetric=True)
    assert awq.unpack(awq.pack(random_weight(8, 32, symmetric=True)), 32, symmetric=True).scheme.symmetric


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight(8, 32, bits=3), "4 bits only"),
        (random_weight(12, 32), "multiple of 8"),
        (random_weight(8, 48), "does not divide"),
        (random_weight(8, 64, act_order=True), "act-order"),
    ],
)
def test_refuses_what_the_layout_cannot_hold(weight: QuantizedWeight, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        awq.pack(weight)


def test_refuses_scales_beyond_float16() -> None:
    weight = random_weight(8, 32)
    huge = QuantizedWeight(weight.codes, torch.full((8, 1), 1e6), weight.zeros, weight.scheme)
    with pytest.raises(ValueError, match="float16"):
        awq.pack(huge)
