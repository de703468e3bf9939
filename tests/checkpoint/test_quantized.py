"""QuantizedWeight: the arithmetic it stands for, and its checks."""

from dataclasses import replace

import pytest
import torch
from checkpoint_samples import random_weight

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme


@pytest.mark.parametrize(("group", "act_order"), [(32, False), (32, True), (-1, False), (40, False)])
def test_dequantize_is_the_formula(group: int, act_order: bool) -> None:
    weight = random_weight(4, 96, group=group, act_order=act_order)
    found = weight.dequantize()
    assert found.dtype == torch.float32
    for n in range(4):
        for k in range(96):
            g = int(weight.g_idx[k]) if weight.g_idx is not None else (0 if group == -1 else k // group)
            expected = (int(weight.codes[n, k]) - int(weight.zeros[n, g])) * weight.scales[n, g].float()
            assert found[n, k] == expected
    assert torch.equal(weight.dequantize(torch.float16), found.half())


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": torch.zeros(4, dtype=torch.uint8)},
        {"codes": torch.zeros(4, 32)},
        {"scales": torch.ones(4, 2)},
        {"scales": torch.ones(4, 1, dtype=torch.float64)},
        {"zeros": torch.ones(3, 1, dtype=torch.uint8)},
        {"g_idx": torch.zeros(32, dtype=torch.int32)},
        {"scheme": QuantScheme(4, 32, False, act_order=True)},
    ],
)
def test_contradictions_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError):
        replace(random_weight(4, 32), **changes)


def test_weights_are_compared_by_identity() -> None:
    weight: QuantizedWeight = random_weight(4, 32)
    assert weight == weight
    assert weight != random_weight(4, 32)
