"""GPTQ's layout: golden words, v1 and v2 zeros, round trips, an independent reader, gptqmodel where installed."""

import numpy as np
import pytest
import torch
from checkpoint_samples import random_weight, same_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.checkpoint import gptq
from llmctl.checkpoint.bits import values_per_period
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme


def bit_stream(words: np.ndarray, bits: int) -> list[int]:
    """Values of one packed row, read as one big integer."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * j)) & ((1 << bits) - 1) for j in range(32 * len(words) // bits)]


def independent_dequantize(planes: dict[str, np.ndarray], bits: int, offset: int) -> np.ndarray:
    """[N, K] from the published layout: qweight packed down K, qzeros along N, zero = stored + offset."""
    codes = np.array([bit_stream(column, bits) for column in planes["qweight"].T], np.float32)
    zeros = np.array([bit_stream(row, bits) for row in planes["qzeros"]], np.float32) + offset
    out = np.empty_like(codes)
    for k, group in enumerate(planes["g_idx"]):
        out[:, k] = (codes[:, k] - zeros[group]) * planes["scales"][group].astype(np.float32)
    return out


def test_golden_words() -> None:
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)  # input k has code k
    zeros = torch.arange(1, 9, dtype=torch.uint8)[:, None]
    weight = QuantizedWeight(codes, torch.ones(8, 1).half(), zeros, QuantScheme(4, -1, False))
    v1, v2 = gptq.pack(weight, "gptq"), gptq.pack(weight, "gptq_v2")
    assert v1["qweight"].tolist() == [[0x76543210] * 8]
    assert [w & 0xFFFFFFFF for w in v1["qzeros"].flatten().tolist()] == [0x76543210]
    assert [w & 0xFFFFFFFF for w in v2["qzeros"].flatten().tolist()] == [0x87654321]
    assert v1["g_idx"].tolist() == [0] * 8
    assert v1["g_idx"].dtype == torch.int32


@pytest.mark.parametrize(("layout", "word"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888)])
def test_symmetric_golden_zeros(layout: str, word: int) -> None:
    planes = gptq.pack(random_weight(8, 32, symmetric=True), layout)
    assert {w & 0xFFFFFFFF for w in planes["qzeros"].flatten().tolist()} == {word}


def test_three_bit_rows_straddle_words() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10] = codes[1, 21] = 7
    weight = QuantizedWeight(
        codes, torch.ones(32, 1).half(), torch.ones(32, 1, dtype=torch.uint8), QuantScheme(3, -1, False)
    )
    qweight = gptq.pack(weight)["qweight"]
    assert [w & 0xFFFFFFFF for w in qweight[:, 0].tolist()] == [0xC0000000, 1, 0]
    assert [w & 0xFFFFFFFF for w in qweight[:, 1].tolist()] == [0, 0x80000000, 3]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(gptq.FORMATS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([32, 64, -1]),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_round_trip(
    bits: int, layout: str, symmetric: bool, act_order: bool, group: int, blocks: int, seed: int
) -> None:
    rows = values_per_period(bits) * blocks
    weight = random_weight(rows, 96, bits, group, symmetric=symmetric, act_order=act_order and group == 32, seed=seed)
    planes = gptq.pack(weight, layout)
    assert {k: tuple(v.shape) for k, v in planes.items()} == {
        k: shape for k, (_, shape) in gptq.plane_specs(weight.shape, weight.scheme).items()
    }
    assert same_weight(gptq.unpack(planes, weight.scheme, layout), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_independent_reader_gets_the_same_weight(bits: int, layout: str, offset: int) -> None:
    weight = random_weight(32, 64, bits, act_order=True)
    planes = {name: plane.numpy() for name, plane in gptq.pack(weight, layout).items()}
    np.testing.assert_array_equal(independent_dequantize(planes, bits, offset), weight.dequantize().numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", gptq.FORMATS)
def test_gptqmodel_gets_the_same_weight(bits: int, layout: str) -> None:
    reason = "gptqmodel is not installed"
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason=reason, exc_type=ImportError)
    convert = pytest.importorskip("gptqmodel.utils.model", reason=reason, exc_type=ImportError)
    weight = random_weight(64, 128, bits, act_order=True)
    module = linear.TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=True, in_features=128, out_features=64, bias=False
    )
    for suffix, plane in gptq.pack(weight, layout).items():
        getattr(module, suffix).data.copy_(plane)
    if layout == "gptq":
        convert.convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.enable_wf_unsqueeze = True
    module._init_wf_unsqueeze_buffers()
    module.dequant_dtype = torch.int16 if bits == 8 else torch.int8
    assert torch.equal(module.dequantize_weight().T.float(), weight.dequantize(torch.float16).float())


@pytest.mark.parametrize("written", gptq.FORMATS)
@pytest.mark.parametrize("tag", gptq.FORMATS)
def test_symmetric_version_is_read_off_the_data(written: str, tag: str) -> None:
    weight = random_weight(8, 64, symmetric=True)
    assert same_weight(gptq.unpack(gptq.pack(weight, written), weight.scheme, tag), weight)


def test_symmetric_claim_is_checked() -> None:
    weight = random_weight(8, 64)
    with pytest.raises(ValueError, match="not all 7"):
        gptq.unpack(gptq.pack(weight), QuantScheme(4, 32, symmetric=True))


def test_version_one_stored_minus_one_wraps_to_zero() -> None:
    weight = random_weight(8, 32)
    planes = gptq.pack(weight)
    planes["qzeros"] = torch.full_like(planes["qzeros"], -1)
    assert int(gptq.unpack(planes, weight.scheme).zeros.max()) == 0


def test_version_one_cannot_hold_zero_points_of_zero() -> None:
    weight = random_weight(8, 32)
    zero = QuantizedWeight(weight.codes, weight.scales, torch.zeros_like(weight.zeros), weight.scheme)
    with pytest.raises(ValueError, match="cannot hold a zero point of 0"):
        gptq.pack(zero)
    assert same_weight(gptq.unpack(gptq.pack(zero, "gptq_v2"), zero.scheme, "gptq_v2"), zero)


def test_g_idx_decides_act_order() -> None:
    weight = random_weight(8, 64)
    planes = gptq.pack(weight)
    claimed = QuantScheme(4, 32, False, act_order=True)
    assert gptq.unpack(planes, claimed).scheme.act_order is False
    planes["g_idx"] = planes["g_idx"].flip(0)
    assert gptq.unpack(planes, weight.scheme).g_idx is not None
    del planes["g_idx"]
    assert same_weight(gptq.unpack(planes, weight.scheme), weight)


@pytest.mark.parametrize("bad", [[0] * 63, [2] * 64, [-1] * 64])
def test_damaged_g_idx(bad: list[int]) -> None:
    weight = random_weight(8, 64)
    planes = {**gptq.pack(weight), "g_idx": torch.tensor(bad, dtype=torch.int32)}
    with pytest.raises(ValueError, match="g_idx"):
        gptq.unpack(planes, weight.scheme)


@pytest.mark.parametrize("shape", [(7, 32), (8, 12)])
def test_refuses_what_the_layout_cannot_hold(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        gptq.check_packable(shape, QuantScheme(4, 4, False))
