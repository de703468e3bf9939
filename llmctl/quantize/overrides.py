"""``--override``: other bits and groups for some linears, named by the expressions of ``--ignore``.

Overrides apply in the order given: where several match a linear, the last one that says a setting decides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.modules import Selection

DENSE_BITS = 16
"""As an override's bits: leave the linear as it is."""

_FORM = "NAME:bits=N, NAME:group-size=N or NAME:bits=N,group-size=N"
_SETTINGS = ("bits", "group-size")


@dataclass(frozen=True)
class Override:
    """One override; a setting that is None stays what it was.

    Attributes:
        text: as given.
        pattern: what it matches, as ``modules.select_modules`` says.
    """

    text: str
    pattern: str
    bits: int | None
    group_size: int | None


def parse_override(text: str) -> Override:
    """An override from ``*.down_proj:bits=8,group-size=32``.

    Raises:
        UsageError: it has another form.
    """
    pattern, _, said = text.rpartition(":")
    pairs = [pair.partition("=") for pair in said.split(",")]
    values: dict[str, int] = {}
    for key, _, value in pairs:
        name = key.strip().replace("_", "-")
        if name not in _SETTINGS or name in values or not pattern:
            raise UsageError(f"--override {text}: expected {_FORM}", param="override")
        try:
            values[name] = int(value)
        except ValueError:
            raise UsageError(
                f"--override {text}: {name}: expected a whole number, found '{value.strip()}'", param="override"
            ) from None
    return Override(text, pattern.strip(), values.get("bits"), values.get("group-size"))


def apply_overrides(
    overrides: Sequence[Override], selection: Selection, scheme: QuantScheme, bits: Mapping[str, int] = {}
) -> tuple[Selection, dict[str, QuantScheme]]:
    """The selection without the linears that are left as they are, and the scheme of every graph weight in it.

    Args:
        scheme: of linears that no override matches.
        bits: module -> its bits, where not the scheme's; an override's come first.

    Raises:
        UsageError: an override that matches no linear to quantize, or nothing left to quantize.
    """
    for override in overrides:
        if not any(module.matches(override.pattern) for module in selection.modules):
            raise UsageError(
                f"--override {override.text}: matches no linear that is quantized",
                fix="llmctl inspect shows their names; --ignore '' quantizes an output head of its own, too",
                param="override",
            )
    schemes: dict[str, QuantScheme] = {}
    kept, dense = [], []
    for module in selection.modules:
        found = [override for override in overrides if module.matches(override.pattern)]
        own_bits = next((o.bits for o in reversed(found) if o.bits is not None), None)
        size = next((o.group_size for o in reversed(found) if o.group_size is not None), scheme.group_size)
        if own_bits == DENSE_BITS:
            dense.append(module.name)
            continue
        kept.append(module)
        own = replace(
            scheme,
            bits=own_bits or bits.get(module.name, scheme.bits),
            group_size=size,
            act_order=scheme.act_order and size != -1,
        )
        schemes |= dict.fromkeys(module.weights, own)
    if not kept:
        raise UsageError("--override leaves no linear to quantize", param="override")
    return Selection(tuple(kept), tuple(sorted({*selection.ignored, *dense}))), schemes
