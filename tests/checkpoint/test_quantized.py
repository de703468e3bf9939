"""QuantizedWeight: the arithmetic it stands for, and its checks."""

from dataclasses import replace

import pytest
import torch
from checkpoint_samples import random_weight

from llmctl.checkpoint.nested import MappedFloats, NestedFloats, stack_nested, usual_values
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


def nested_weight(rows: int, groups: int = 4, shared: int = 2, *, minimum: bool = True) -> QuantizedWeight:
    """Codes of 4 bits in groups of 8."""
    scheme = QuantScheme(4, 8, not minimum, minimum=minimum, nested=shared)
    parts = []
    for sign in (1, -1)[: 1 + minimum]:
        codes = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
        supers = (sign * torch.rand(rows, groups // shared)).half()
        parts.append(NestedFloats(codes, supers, scheme.nested_zero))
    codes = torch.randint(0, 16, (rows, 8 * groups), dtype=torch.uint8)
    zeros = torch.full((rows, groups), 0 if minimum else 8, dtype=torch.uint8)
    floats = [part.floats() for part in parts]
    return QuantizedWeight(codes, floats[0], zeros, scheme, None, floats[1] if minimum else None, tuple(parts))


@pytest.mark.parametrize("minimum", [True, False])
def test_nested_scales_are_products_and_follow_their_rows(minimum: bool) -> None:
    first, second = nested_weight(5, minimum=minimum), nested_weight(3, minimum=minimum)
    assert first.nested is not None
    part = first.nested[0]
    assert isinstance(part, NestedFloats)
    assert part.floats()[4, 3] == (int(part.codes[4, 3]) - (0 if minimum else 128)) * part.supers[4, 1].float()
    whole = stack_rows([first, second])
    turned = whole.take_rows(torch.tensor([6, 0, 4]))
    for weight in (whole, turned):
        assert weight.nested is not None
        for floats, kept in zip((weight.scales, weight.minimums)[: 1 + minimum], weight.nested, strict=True):
            assert torch.equal(floats, kept.floats())
    assert torch.equal(turned.dequantize(), torch.cat([first.dequantize(), second.dequantize()])[[6, 0, 4]])


@pytest.mark.parametrize("what", ["none", "count", "kind", "shape", "dtype", "zero", "groups", "scales", "minimums"])
def test_nested_scales_that_contradict_the_scheme_are_refused(what: str) -> None:
    weight = nested_weight(4)
    assert weight.nested is not None
    part = weight.nested[0]
    assert isinstance(part, NestedFloats)
    changes = {
        "none": {"nested": None},
        "count": {"nested": (part,)},
        "kind": {"nested": (part, mapped(4, 4, 2))},
        "shape": {"nested": (replace(part, codes=part.codes[:2]), part)},
        "dtype": {"nested": (part, replace(part, supers=part.supers.float()))},
        "zero": {"nested": (replace(part, zero=128), weight.nested[1])},
        "groups": {"scheme": replace(weight.scheme, nested=3)},
        "scales": {"scales": weight.scales * 2},
        "minimums": {"nested": (part, part)},
    }
    with pytest.raises(ValueError, match="nested"):
        replace(weight, **changes[what])


def mapped(rows: int, groups: int, shared: int) -> MappedFloats:
    """As a file's tensor of ``rows`` has them."""
    supers = -(-rows * groups // shared)
    starts = torch.arange(rows, dtype=torch.int32) * groups
    codes = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    return MappedFloats(codes, torch.rand(supers), torch.rand(1).expand(supers), starts, shared, usual_values())


@pytest.mark.parametrize("shared", [1, 4, 7, 20, 1000])
def test_mapped_scales_follow_their_rows(shared: int) -> None:
    """Of file tensors whose supers end within a row or hold several, stacked, sliced and turned."""
    first, second = mapped(9, 5, shared), mapped(6, 5, shared)
    at = torch.arange(45) // shared
    flat = usual_values()[first.codes.flatten().int()] * first.supers[at] + first.offsets[at]
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
    changes = {"shared": 8, "starts": part.starts[:3], "codes": part.codes[:, :1]}
    for name, value in changes.items():
        with pytest.raises(ValueError, match="nested: expected codes, starts and shared"):
            QuantizedWeight(codes, part.floats(), zeros, scheme, nested=(replace(part, **{name: value}),))
    with pytest.raises(ValueError, match="expected codes of the usual map"):
        QuantizedWeight(codes, part.floats(), zeros, scheme, nested=(replace(part, values=part.values * 2),))
    with pytest.raises(ValueError, match="expected scales and minimums to be what the codes multiply out to"):
        QuantizedWeight(codes, part.floats() + 1, zeros, scheme, nested=(part,))
