"""QuantizedWeight: the arithmetic it stands for, and its checks."""

from dataclasses import replace

import pytest
import torch
from checkpoint_samples import random_weight

from llmctl.checkpoint.quantized import NestedFloats, QuantizedWeight, stack_rows
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


def nested_weight(rows: int, groups: int = 4, shared: int = 2) -> QuantizedWeight:
    """Codes of 4 bits in groups of 8."""
    parts = []
    for sign in (1, -1):
        codes = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
        parts.append(NestedFloats(codes, (sign * torch.rand(rows, groups // shared)).half()))
    codes = torch.randint(0, 16, (rows, 8 * groups), dtype=torch.uint8)
    scheme = QuantScheme(4, 8, False, minimum=True, nested=shared)
    zeros = torch.zeros(rows, groups, dtype=torch.uint8)
    floats = [part.floats() for part in parts]
    return QuantizedWeight(codes, floats[0], zeros, scheme, None, floats[1], (parts[0], parts[1]))


def test_nested_scales_are_products_and_follow_their_rows() -> None:
    first, second = nested_weight(5), nested_weight(3)
    assert first.nested is not None
    part = first.nested[0]
    assert part.floats()[4, 3] == part.codes[4, 3].float() * part.supers[4, 1].float()
    whole = stack_rows([first, second])
    turned = whole.take_rows(torch.tensor([6, 0, 4]))
    for weight in (whole, turned):
        assert weight.nested is not None
        for floats, kept in zip((weight.scales, weight.minimums), weight.nested, strict=True):
            assert torch.equal(floats, kept.floats())
    assert torch.equal(turned.dequantize(), torch.cat([first.dequantize(), second.dequantize()])[[6, 0, 4]])


@pytest.mark.parametrize("what", ["none", "shape", "dtype", "groups"])
def test_nested_scales_that_contradict_the_scheme_are_refused(what: str) -> None:
    weight = nested_weight(4)
    assert weight.nested is not None
    part = weight.nested[0]
    changes = {
        "none": {"nested": None},
        "shape": {"nested": (NestedFloats(part.codes[:2], part.supers), part)},
        "dtype": {"nested": (part, NestedFloats(part.codes, part.supers.float()))},
        "groups": {"scheme": replace(weight.scheme, nested=3)},
    }
    with pytest.raises(ValueError, match="nested"):
        replace(weight, **changes[what])
