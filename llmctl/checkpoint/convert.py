"""Convert a quantized checkpoint to another format that holds the same numbers, bit for bit, or say why it cannot.

What was written is read back and compared, weight by weight, before it appears.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.accounting import Unused
from llmctl.checkpoint.assemble import accounted_graph
from llmctl.checkpoint.exact import exact_dtype, holds
from llmctl.checkpoint.gguf_encode import minimums
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import AS_STORED, FORMATS, OutputFormat, describe_scheme, gptq_format
from llmctl.checkpoint.quantized import QuantizedWeight
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


def convert_checkpoint(config: ConvertConfig) -> ConvertReport:
    """Convert ``config.model`` into the new ``config.output``.

    Raises:
        UsageError: a dense model; numbers, a model or a tokenizer that the format does not hold; an output in the way.
        CheckpointError, UnsupportedModelError: a model that cannot be read. ModelNotFoundError: no such model.
    """
    started = time.monotonic()
    if config.to not in FORMATS:
        raise UsageError(f"--to {config.to}: expected one of {', '.join(FORMATS)}", param="to")
    if not config.output:
        raise UsageError("--output: what to write is missing", param="output")
    output = Path(config.output)
    check_new(output)
    checkpoint = open_checkpoint(resolve_model(config.model))
    if checkpoint.quantization is None:
        raise UsageError(
            f"{checkpoint.path} is not quantized",
            fix=f"llmctl quantize --model {config.model} --output {config.output}",
            param="model",
        )
    graph, unused = accounted_graph(checkpoint)
    job = _Job(checkpoint, graph, unused, config.to)
    compared = job.write(output)
    return ConvertReport(
        model=config.model,
        output=config.output,
        source=checkpoint.quantization.method,
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

    def __init__(self, checkpoint: Checkpoint, graph: Graph, unused: tuple[Unused, ...], to: str) -> None:
        self.checkpoint = checkpoint
        self.left_out = [name for kind in unused for name in kind.names]
        linears = {
            part.tensor.removesuffix(".weight") for op in graph.linears() for part in graph.weights[op.weights[0]].parts
        }
        tables = {part.tensor.removesuffix(".weight") for name in graph.tables() for part in graph.weights[name].parts}
        found = {module: scheme for module, scheme in _schemes(checkpoint) if f"{module}.weight" not in self.left_out}
        self.schemes = {m: s for m, s in found.items() if m in linears and m not in tables}
        self.settings = _settings(to, self.schemes, sorted(linears - tables - self.schemes.keys()), checkpoint)
        check_writable(checkpoint, self.settings)
        self.widened = {f"{m}.weight": _widened(checkpoint, m) for m in sorted(found.keys() - self.schemes.keys())}

    def write(self, output: Path) -> int:
        """Write and compare; the number of weights that were compared."""
        check_new(output, self.settings)
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
        except ValueError as error:
            raise _refused(self.settings.format, str(error)) from error
        return len(self._names())

    def _names(self) -> list[str]:
        return [name for name in self.checkpoint.names() if name not in self.left_out]

    def _check_same(self, written: Path) -> None:
        import torch

        made = open_checkpoint(written)
        for name in self._names():
            before, after = self.checkpoint.weight(name), made.weight(name)
            old, new = _dense(before), _dense(after)
            if not torch.equal(old, new):
                delta = float((old.double() - new.double()).abs().max())
                module = name.removesuffix(".weight") if isinstance(before, QuantizedWeight) else name
                why = _reason(before) if isinstance(before, QuantizedWeight) else "its dtype cannot hold the values"
                raise _refused(self.settings.format, f"max |delta w| {delta:.2g} in {module}: {why}")


class _Modules(Mapping[str, QuantizedWeight]):
    """Module -> its weight, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme]) -> None:
        self._checkpoint, self._schemes = checkpoint, schemes

    def __getitem__(self, name: str) -> QuantizedWeight:
        weight = self._checkpoint.weight(f"{name}.weight")
        assert isinstance(weight, QuantizedWeight)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)


def _schemes(checkpoint: Checkpoint) -> Iterator[tuple[str, QuantScheme]]:
    for name in checkpoint.names():
        scheme = checkpoint.describe(name).quant
        if scheme is not None:
            yield name.removesuffix(".weight"), scheme


def _settings(to: str, schemes: Mapping[str, QuantScheme], dense: list[str], checkpoint: Checkpoint) -> OutputFormat:
    """Settings of an output with these modules.

    Raises:
        UsageError: the format cannot hold one of them.
    """
    if not schemes:
        raise UsageError(f"{checkpoint.path}: no linear is quantized", param="model")
    main = Counter(schemes.values()).most_common(1)[0][0]
    to = gptq_format(all(scheme.symmetric for scheme in schemes.values())) if to == "gptq" else to
    try:
        settings = OutputFormat(
            format=to,
            scheme=main,
            others={module: scheme for module, scheme in schemes.items() if scheme != main},
            ignored=tuple(sorted({*dense, *({"lm_head"} - schemes.keys())})),
            dtype=AS_STORED,
        )
        settings.quantization_config()
        for module in schemes:
            rows, columns = checkpoint.describe(f"{module}.weight").shape
            settings.check(module, (rows, columns))
    except ValueError as error:
        raise _refused(to, str(error)) from error
    return settings


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


def _refused(to: str, why: str) -> UsageError:
    return UsageError(
        f"--to {to}: {why}",
        fix="choose a format that holds these numbers (docs/formats.md), or quantize the 16-bit checkpoint anew",
        param="to",
    )
