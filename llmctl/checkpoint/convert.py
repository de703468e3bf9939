"""Convert a quantized checkpoint to another format that holds the same numbers, bit for bit, or say why it cannot.

What was written is read back and compared, weight by weight, before it appears.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.accounting import Unused
from llmctl.checkpoint.assemble import accounted_graph, names_of
from llmctl.checkpoint.exact import exact_dtype, holds
from llmctl.checkpoint.gguf_encode import minimums
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import AS_STORED, FORMATS, OutputFormat, describe_scheme, gptq_format
from llmctl.checkpoint.quant_config import QuantizationInfo
from llmctl.checkpoint.quantized import QuantizedWeight, in_eight_bits
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.checkpoint.writer import check_new, check_writable, write_quantized_checkpoint
from llmctl.config import ConvertConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import Graph, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConvertReport:
    """A finished conversion.

    Attributes:
        source: format of the model that was converted. format: that of the output.
        schemes: scheme in words -> number of modules.
        widened: tensors that are dense in the output, though quantized in the model -> their dtype.
        left_out: why tensors were left out -> how many.
        compared: weights that were read back from the output and are the same numbers.
        size_before, size_after: stored weights, bytes.
        seconds: wall time.
    """

    model: str
    output: str
    source: str
    format: str
    schemes: Mapping[str, int]
    widened: Mapping[str, str]
    left_out: Mapping[str, int]
    compared: int
    size_before: int
    size_after: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return asdict(self)


_ONLY_GGUF = (5, 6)
"""Widths of codes that are read of GGUF, and written as 8."""

CONVERTED = tuple(name for name, row in FORMATS.items() if row.rounded is None)
"""What ``--to`` may be: the formats that keep every number."""

Show = Callable[[str, str, int, int], None]


def convert_checkpoint(config: ConvertConfig, show: Show = lambda *_: None) -> ConvertReport:
    """Convert ``config.model`` into the new ``config.output``.

    Args:
        show: is told of every weight compared: (what is counted, the weight, done, in all).

    Raises:
        UsageError: a dense model; numbers, a model or a tokenizer that the format does not hold; an output in the way.
        CheckpointError, UnsupportedModelError: a model that cannot be read. ModelNotFoundError: no such model.
    """
    started = time.monotonic()
    if config.to not in CONVERTED:
        found = f"--to {config.to}" if config.to else "--to is missing"
        raise UsageError(f"{found}: expected one of {', '.join(CONVERTED)}", param="to")
    if not config.output:
        raise UsageError("--output is missing: the folder to write, or NAME.gguf for --to gguf", param="output")
    output = Path(config.output)
    check_new(output)
    checkpoint = open_checkpoint(resolve_model(config.model), as_family=config.as_family)
    if checkpoint.quantization is None:
        raise UsageError(
            f"{checkpoint.path} is not quantized",
            fix=f"llmctl quantize --model {config.model} --format {config.to} --output {config.output}",
            param="model",
        )
    graph, unused = accounted_graph(checkpoint)
    job = _Job(checkpoint, graph, unused, config.to, show)
    compared = job.write(output)
    return ConvertReport(
        model=config.model,
        output=config.output,
        source=_spelt(checkpoint.quantization),
        format=job.settings.format,
        schemes=dict(Counter(describe_scheme(scheme) for scheme in job.schemes.values())),
        widened={name: str(value.dtype).removeprefix("torch.") for name, value in job.widened.items()},
        left_out={kind.reason: len(kind.names) for kind in unused},
        compared=compared,
        size_before=checkpoint.nbytes,
        size_after=open_checkpoint(output).nbytes,
        seconds=round(time.monotonic() - started, 3),
    )


class _Job:
    """One conversion, settled: every structural refusal is spoken when it is made."""

    def __init__(self, checkpoint: Checkpoint, graph: Graph, unused: tuple[Unused, ...], to: str, show: Show) -> None:
        self.checkpoint, self._to, self._show = checkpoint, to, show
        self.left_out = names_of(unused)
        # Norms that multiply by 1 + w, which is what GGUF has of them, and is compared.
        shifted = {op.weights[0] for op in graph.ops if op.attrs.get("plus_one")} if to == "gguf" else set()
        self._plus_one = {part.tensor for name in shifted for part in graph.weights[name].parts}
        linears = {
            part.tensor.removesuffix(".weight")
            for op in graph.products()
            for part in graph.weights[op.weights[0]].parts
        }
        tables = {part.tensor.removesuffix(".weight") for name in graph.tables() for part in graph.weights[name].parts}
        found = {module: scheme for module, scheme in _schemes(checkpoint) if f"{module}.weight" not in self.left_out}
        self._widened_codes = any(scheme.bits in _ONLY_GGUF for scheme in found.values())
        self.schemes = {m: _written(s) for m, s in found.items() if m in linears and m not in tables}
        self._dense_modules = sorted(linears - tables - self.schemes.keys())
        if not self.schemes:
            raise UsageError(f"{checkpoint.path}: no linear is quantized", param="model")
        try:
            self.settings = self._settings(to)
        except ValueError as error:
            raise self._refused(str(error)) from error
        check_writable(checkpoint, self.settings)
        self.widened = {f"{m}.weight": _widened(checkpoint, m) for m in sorted(found.keys() - self.schemes.keys())}

    def write(self, output: Path) -> int:
        """Write and compare; the number of weights that were compared."""
        check_new(output, self.settings.format)
        modules = _Modules(self.checkpoint, self.schemes)
        try:
            write_quantized_checkpoint(
                output,
                self.checkpoint,
                modules,
                self.widened,
                self.settings,
                left_out=self.left_out,
                check=self._check_same,
            )
        except UsageError:
            raise
        except ValueError as error:
            raise self._refused(str(error)) from error
        return len(self._names())

    def _names(self) -> list[str]:
        return [name for name in self.checkpoint.names() if name not in self.left_out]

    def _check_same(self, written: Path) -> None:
        import torch

        made, names = open_checkpoint(written), self._names()
        for number, name in enumerate(names, 1):
            before, after = self.checkpoint.weight(name), made.weight(name)
            old, new = _dense(before), _dense(after)
            if name in self._plus_one:
                old, new = old + 1, new + 1
            if not torch.equal(old, new):
                delta = float((old.double() - new.double()).abs().max())
                module = name.removesuffix(".weight") if isinstance(before, QuantizedWeight) else name
                why = _reason(before) if isinstance(before, QuantizedWeight) else "its dtype cannot hold the values"
                raise self._refused(f"max |delta w| {delta:.2g} in {module}: {why}")
            self._show("compared", name, number, len(names))

    def _settings(self, to: str) -> OutputFormat:
        """Settings of an output in a format.

        Raises:
            ValueError: the format cannot hold one of the modules.
        """
        main = Counter(self.schemes.values()).most_common(1)[0][0]
        settings = OutputFormat(
            format=gptq_format(all(scheme.symmetric for scheme in self.schemes.values())) if to == "gptq" else to,
            scheme=main,
            others={module: scheme for module, scheme in self.schemes.items() if scheme != main},
            ignored=tuple(sorted({*self._dense_modules, *({"lm_head"} - self.schemes.keys())})),
            dtype=AS_STORED,
        )
        settings.quantization_config()
        for module in self.schemes:
            rows, columns = self.checkpoint.describe(f"{module}.weight").shape
            settings.check(module, (rows, columns))
        return settings

    def _refused(self, why: str) -> UsageError:
        """The refusal, with the other formats whose codes and groups are like these; their floats are seen later."""
        if self._widened_codes:
            why += " (codes of 5 and 6 bits would be written as 8)"
        here = self.checkpoint.quantization
        known = (self._to, "gptq_v2", here and _spelt(here))  # gptq is version 2 where it has to be
        others = [name for name in CONVERTED if name not in known and self._has_room(name)]
        instead = f"try {' or '.join(f'--to {name}' for name in others)}, or " if others else ""
        return UsageError(
            f"--to {self._to}: {why}", fix=f"{instead}quantize the 16-bit checkpoint anew: llmctl quantize", param="to"
        )

    def _has_room(self, to: str) -> bool:
        try:
            check_writable(self.checkpoint, self._settings(to))
        except ValueError:
            return False
        return True


class _Modules(Mapping[str, QuantizedWeight]):
    """Module -> its weight, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme]) -> None:
        self._checkpoint, self._schemes = checkpoint, schemes

    def __getitem__(self, name: str) -> QuantizedWeight:
        weight = self._checkpoint.weight(f"{name}.weight")
        assert isinstance(weight, QuantizedWeight)
        return in_eight_bits(weight) if weight.scheme.bits in _ONLY_GGUF else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)


def _schemes(checkpoint: Checkpoint) -> Iterator[tuple[str, QuantScheme]]:
    for name in checkpoint.names():
        scheme = checkpoint.describe(name).quant
        if scheme is not None:
            yield name.removesuffix(".weight"), scheme


def _written(scheme: QuantScheme) -> QuantScheme:
    """The scheme of a module as it is written."""
    return replace(scheme, bits=8) if scheme.bits in _ONLY_GGUF else scheme


def _widened(checkpoint: Checkpoint, module: str) -> Tensor:
    """A quantized weight that the formats have dense (an embedding), in the least dtype that holds its numbers."""
    import torch

    weight = _dense(checkpoint.weight(f"{module}.weight"))
    return weight.to(getattr(torch, exact_dtype(weight)))


def _dense(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()


def _reason(weight: QuantizedWeight) -> str:
    """Which numbers of a weight the output's float16 did not hold."""
    if not holds(weight.scales, "float16"):
        return "float16 cannot hold its scales"
    if not weight.scheme.symmetric and not holds(minimums(weight), "float16"):
        return "float16 cannot hold its minimums"
    return "the format rounds its numbers"


def _spelt(info: QuantizationInfo) -> str:
    """A checkpoint's format, as ``FORMATS`` calls it where it is among them."""
    return info.checkpoint_format if info.checkpoint_format in FORMATS else info.method
