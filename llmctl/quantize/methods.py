"""What ``--method`` may be: one row for each, with the scheme and the formats that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmctl.config import QUANTIZED_BITS, QUANTIZED_GROUP, QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        calibrated: whether it looks at activations.
        bits, group_size: without ``--bits`` and ``--group-size``.
        book: the code book of its weights; "" for integers.
        formats: those that it can be written in, the first by default; none said: by the weights (``choose_format``).
        fixed: what of ``bits``, ``group_size`` and ``symmetric`` cannot be otherwise.
    """

    calibrated: bool
    bits: int = QUANTIZED_BITS
    group_size: int = QUANTIZED_GROUP
    book: str = ""
    formats: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()


_OF_GPTQ = ("damp_percent", "act_order", "static_groups", "sweeps", "original_targets")
_OF_CALIBRATION = ("calib", "calib_samples", "calib_length", "seed")
_ALL = frozenset({"bits", "group_size", "symmetric"})
METHODS: Mapping[str, Method] = {
    "rtn": Method(calibrated=False),
    "awq": Method(calibrated=True),
    "gptq": Method(calibrated=True),
    "awq+gptq": Method(calibrated=True),
    "w8a8": Method(True, 8, -1, "", ("compressed-tensors-w8a8",), _ALL),
    "fp8": Method(False, 8, -1, "fp8_e4m3", ("compressed-tensors",), _ALL),
    "nf4": Method(False, 4, 64, "nf4", ("bitsandbytes", "bitsandbytes-double"), _ALL - {"group_size"}),
}
CHOOSES_BITS = tuple(name for name, method in METHODS.items() if "bits" not in method.fixed)
"""Those that quantize to the bits that one asks for."""
_OTHER_NAMES = {
    **dict.fromkeys(("int4", "w4a16", "4bit", "4-bit"), "--method awq --bits 4"),
    **dict.fromkeys(("int8", "w8a16", "8bit", "8-bit"), "--method rtn --bits 8"),
    **dict.fromkeys(("smoothquant", "int8-w8a8"), "--method w8a8"),
    **dict.fromkeys(("bitsandbytes", "bnb"), "--method nf4"),
}
"""What others call by these words, in options."""


def method_of(config: QuantizeConfig) -> Method:
    """The row of ``--method``.

    Raises:
        UsageError: there is none.
    """
    if config.method not in METHODS:
        named = config.method.lower()
        raise UsageError(
            f"--method {config.method}: expected auto or one of {', '.join(METHODS)}",
            fix=f"--method {named}" if named in METHODS else _OTHER_NAMES.get(named, "--method auto"),
            param="method",
        )
    return METHODS[config.method]


def scheme_of(config: QuantizeConfig) -> QuantScheme:
    """What linears are quantized to without overrides, act-order left out.

    Raises:
        UsageError: an option that the method has no choice of, given otherwise.
    """
    method = method_of(config)
    settled = {"bits": method.bits, "group_size": method.group_size, "symmetric": config.is_symmetric}
    for name in ("bits", "group_size", "symmetric"):
        given, own = getattr(config, name), True if name == "symmetric" else getattr(method, name)
        if given is None:
            continue
        if name in method.fixed and given != own:
            raise UsageError(
                f"{_shown(name, given)}: --method {config.method} has {_shown(name, own)} only",
                fix=f"leave out {_shown(name, given)}",
                param=name,
            )
        settled[name] = given
    return QuantScheme(settled["bits"], settled["group_size"], bool(settled["symmetric"]), book=method.book)


def unused_options(config: QuantizeConfig) -> list[str]:
    """Fields of the options that the method has no use for."""
    names = [] if "gptq" in config.steps else [*_OF_GPTQ]
    if method_of(config).calibrated or config.has_budget:
        return names
    return [*names, *(name for name in _OF_CALIBRATION if not (name == "seed" and config.rotate))]


def _shown(name: str, value: int) -> str:
    if name == "symmetric":
        return "--symmetric" if value else "--asymmetric"
    return f"--{name.replace('_', '-')} {value}"
