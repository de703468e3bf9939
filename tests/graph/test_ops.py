"""The declared op kinds agree with each other."""

from __future__ import annotations

from llmctl.graph.ops import OP_KINDS


def test_names_that_kinds_give_each_other_are_kinds() -> None:
    added = {kind.name: OP_KINDS[kind.after_add] for kind in OP_KINDS.values() if kind.after_add}
    assert added.keys() == {"rms_norm", "layer_norm"}
    for name, after in added.items():
        kind = OP_KINDS[name]
        assert (after.inputs, after.outputs) == ((*kind.inputs, "residual"), (*kind.outputs, "sum"))
        assert (after.weights, after.optional, after.attrs) == (kind.weights, kind.optional, kind.attrs)


def test_int8_rows_are_the_first_two_outputs() -> None:
    for kind in OP_KINDS.values():
        assert (kind.outputs[:2] == ("q", "scale")) == kind.int8_rows
        if kind.as_int8:
            made = OP_KINDS[kind.as_int8]
            assert made.int8_rows
            assert (made.inputs, made.outputs[2:]) == (kind.inputs, kind.outputs[1:])
            assert (made.weights, made.optional, made.attrs) == (kind.weights, kind.optional, kind.attrs)
    forms = {kind.as_int8 for kind in OP_KINDS.values()} - {""}
    assert {name for name, kind in OP_KINDS.items() if kind.int8_rows} == forms | {"quantize"}


def test_every_kind_says_what_it_computes() -> None:
    for kind in OP_KINDS.values():
        assert kind.computes
        assert "\n" not in kind.computes
