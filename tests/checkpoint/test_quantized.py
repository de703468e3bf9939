"""QuantizedWeight: the arithmetic it stands for, and its checks."""

from dataclasses import replace

import pytest
import torch
from checkpoint_samples import random_weight

from llmctl.checkpoint.nested import MappedFloats, NestedFloats, nested_map, stack_nested
from llmctl.checkpoint.quantized import QuantizedWeight, stack_rows
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
    assert isinstance(part, NestedFloats)
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
    assert isinstance(part, NestedFloats)
    changes = {
        "none": {"nested": None},
        "shape": {"nested": (NestedFloats(part.codes[:2], part.supers), part)},
        "dtype": {"nested": (part, NestedFloats(part.codes, part.supers.float()))},
        "groups": {"scheme": replace(weight.scheme, nested=3)},
    }
    with pytest.raises(ValueError, match="nested"):
        replace(weight, **changes[what])


def mapped(rows: int, groups: int, shared: int) -> MappedFloats:
    """As a file's tensor of ``rows`` has them."""
    supers = -(-rows * groups // shared)
    starts = torch.arange(rows, dtype=torch.int32) * groups
    codes = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    return MappedFloats(codes, torch.rand(supers), torch.rand(1).expand(supers), starts, shared)


@pytest.mark.parametrize("shared", [1, 4, 7, 20, 1000])
def test_mapped_scales_follow_their_rows(shared: int) -> None:
    """Of file tensors whose supers end within a row or hold several, stacked, sliced and turned."""
    first, second = mapped(9, 5, shared), mapped(6, 5, shared)
    at = torch.arange(45) // shared
    flat = nested_map()[first.codes.flatten().int()] * first.supers[at] + first.offsets[at]
    assert torch.equal(first.floats(), flat.reshape(9, 5))
    whole = torch.cat([first.floats(), second.floats()])
    (stacked,) = stack_nested([(first,), (second,)])
    assert torch.equal(stacked.floats(), whole)
    for rows in (slice(3, 8), slice(14, 15), torch.tensor([12, 1, 2, 9])):
        some = stacked.rows(rows)
        assert isinstance(some, MappedFloats)
        assert torch.equal(some.floats(), whole[rows])
    (again,) = stack_nested([(first.rows(slice(2, 5)),), (second.rows(slice(1, 6)),)])
    assert isinstance(again, MappedFloats)
    assert torch.equal(again.floats(), torch.cat([first.floats()[2:5], second.floats()[1:6]]))
    assert len(again.supers) <= 8 * 5 // shared + 2 * 2  # what a plane has room for


def test_mapped_scales_that_contradict_the_scheme_are_refused() -> None:
    part = mapped(4, 2, 4)
    scheme = QuantScheme(4, 8, True, book="nf4", nested=4)
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    assert QuantizedWeight(codes, part.floats(), zeros, scheme, nested=(part,)).nested == (part,)
    for other in (
        replace(part, shared=8),
        replace(part, starts=part.starts[:3]),
        replace(part, codes=part.codes[:, :1]),
    ):
        with pytest.raises(ValueError, match="nested: expected codes, starts and shared"):
            QuantizedWeight(codes, part.floats(), zeros, scheme, nested=(other,))
