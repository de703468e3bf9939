"""What a quantization reports: sizes, bits per weight, errors, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import describe_scheme
from llmctl.checkpoint.reader import Checkpoint
from llmctl.graph.graph import Graph
from llmctl.quantize.parts import PartSize, part_sizes
from llmctl.quantize.plan import Plan
from llmctl.quantize.quality import Quality


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer.

    Attributes:
        layer: its index.
        modules: linear -> relative squared error, of its output on the calibration inputs (awq, gptq) or of its weight
            (rtn, which sees no inputs).
        scales: buffer -> the exponent that the search for channel scales chose there; None where no scaling was best or
            possible.
        seconds: time it took.
        few_tokens: linears of experts that saw too few tokens of the calibration text, and how many: they are rounded
            to nearest, their errors those of the weights.
    """

    layer: int
    modules: Mapping[str, float]
    scales: Mapping[str, float | None]
    seconds: float
    few_tokens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerReport:
        """The report a work folder kept."""
        return cls(
            int(data["layer"]),
            data.get("modules", {}),
            data.get("scales", {}),
            float(data.get("seconds", 0.0)),
            data.get("few_tokens", {}),
        )

    @property
    def error(self) -> float:
        """Mean of the linears' errors; 0 for a layer without any."""
        return sum(self.modules.values()) / len(self.modules) if self.modules else 0.0


@dataclass(frozen=True)
class LinearReport:
    """A quantized linear: bits of a code, and stored bits a weight, counted as ``bits_per_weight``."""

    bits: int
    bits_per_weight: float


@dataclass(frozen=True)
class QuantizeReport:
    """A finished quantization.

    Attributes:
        size_before: weights as stored in the source, bytes; size_16bit: the same weights at 16 bits, bytes.
        size_after: weights as stored in the output, bytes.
        bits, group_size, symmetric: of linears that neither an override nor a budget gives others.
        bits_per_weight: of the quantized linears, scales, zero points and group tables included.
        bits_per_weight_model: of the whole output.
        linears: of each that is quantized, by its name.
        predicted_kl: of the linears whose bits were chosen, as the measurements add up; None where none were.
        schemes: scheme in words -> number of linears.
        parts: part of the model -> its size before and after.
        quality: what it did to the model's predictions; None: not measured.
        merged: the adapters that were merged before, in words. rotated: whether a rotation was folded in.
        error_of: what the layers' errors are of: ``output`` or ``weight``.
        seconds: wall time of this run.
    """

    model: str
    output: str
    method: str
    bits: int
    group_size: int
    symmetric: bool
    format: str
    calibration: str
    quantized_modules: int
    dense_modules: tuple[str, ...]
    size_before: int
    size_16bit: int
    size_after: int
    bits_per_weight: float
    bits_per_weight_model: float
    linears: Mapping[str, LinearReport]
    predicted_kl: float | None
    schemes: Mapping[str, int]
    error_of: str
    layers: tuple[LayerReport, ...]
    seconds: float
    parts: Mapping[str, PartSize] = field(default_factory=dict)
    quality: Quality | None = None
    merged: tuple[str, ...] = ()
    rotated: bool = False

    @property
    def widths(self) -> str:
        """All bits that linears have: ``3/4/8``."""
        return "/".join(map(str, sorted({linear.bits for linear in self.linears.values()})))

    @property
    def worst_layers(self) -> list[LayerReport]:
        """Up to five layers, the one with the largest mean error first."""
        return sorted((layer for layer in self.layers if layer.modules), key=lambda layer: -layer.error)[:5]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data; layers carry their mean error too."""
        layers = [{"error": layer.error, **asdict(layer)} for layer in self.layers]
        quality = None if self.quality is None else self.quality.to_json()
        return {**asdict(self), "dense_modules": list(self.dense_modules), "layers": layers, "quality": quality}


def make_report(
    plan: Plan,
    graph: Graph,
    checkpoint: Checkpoint,
    calibration: str,
    layers: list[LayerReport],
    seconds: float,
    predicted_kl: float | None = None,
    merged: Sequence[str] = (),
) -> QuantizeReport:
    """The report of a finished run; sizes are read off the output."""
    output = Path(plan.config.output)
    files = [output] if output.is_file() else output.glob("*.safetensors")
    size_after = sum(path.stat().st_size for path in files)
    weights = sum(prod(weight.shape) for weight in graph.weights.values())
    written = open_checkpoint(output)
    stored = {m.name: written.describe(f"{m.name}.weight").nbytes for m in plan.selection.modules}
    return QuantizeReport(
        model=plan.config.model,
        output=plan.config.output,
        method=plan.config.method,
        bits=plan.scheme.bits,
        group_size=plan.scheme.group_size,
        symmetric=plan.scheme.symmetric,
        format=plan.output.format,
        calibration=calibration,
        quantized_modules=len(plan.selection.modules),
        dense_modules=plan.output.ignored,
        size_before=checkpoint.nbytes,
        size_16bit=2 * weights,
        size_after=size_after,
        bits_per_weight=8 * sum(stored.values()) / sum(prod(module.shape) for module in plan.selection.modules),
        bits_per_weight_model=8 * size_after / weights,
        linears={
            m.name: LinearReport(plan.output.scheme_of(m.name).bits, 8 * stored[m.name] / prod(m.shape))
            for m in plan.selection.modules
        },
        predicted_kl=predicted_kl,
        schemes=dict(Counter(describe_scheme(plan.output.scheme_of(m.name)) for m in plan.selection.modules)),
        error_of="output" if plan.calibrated else "weight",
        layers=tuple(layers),
        seconds=round(seconds, 3),
        parts=part_sizes(graph, written),
        merged=tuple(merged),
        rotated=plan.config.rotate,
    )
