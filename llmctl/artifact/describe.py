"""An engine folder, or the engine a checkpoint would become, as one plain document for people and machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmctl.artifact.describe_checkpoint import describe_checkpoint, quantization_document
from llmctl.artifact.loader import EngineChecks, check_no_family, is_engine, read_manifest
from llmctl.artifact.manifest import Manifest, QuantizationRecord
from llmctl.artifact.memory import Sizing, human_bytes
from llmctl.artifact.memory_table import memory_document, memory_rows
from llmctl.artifact.plan import plan_build, quantization_record
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.strict import to_data
from llmctl.checkpoint.output_format import describe_scheme
from llmctl.checkpoint.safetensors_io import read_header
from llmctl.config import BuildConfig
from llmctl.errors import EngineLoadError, UnsupportedModelError, UsageError
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.targets.base import BuildOptions, KernelChoice, Target
from llmctl.targets.planes import flat
from llmctl.targets.table import target_of


def describe_model(model: str, *, verify: bool = False, as_family: str = "") -> dict[str, Any]:
    """The document of an engine folder, or of what ``build`` with its defaults would make of any other model.

    Where ``build`` supports no such model, the document of the checkpoint alone, with the reason as ``not_built``.

    Raises:
        EngineLoadError: an engine with a missing, truncated or (with ``verify``) changed file.
        ModelNotFoundError, CheckpointError: as ``plan_build``.
        UnsupportedModelError: a checkpoint that cannot be read.
    """
    if is_engine(Path(model)):
        check_no_family(model, as_family)
        return _describe_engine(Path(model), verify)
    return _describe_plan(model, as_family)


def _describe_engine(path: Path, verify: bool) -> dict[str, Any]:
    manifest = read_manifest(path)
    checks = EngineChecks(path, manifest)
    checks.files(verify)
    entries = {k: v for name in manifest.weight_files for k, v in read_header(path / name).tensors.items()}
    return {
        "path": str(path),
        "kind": "engine",
        "runs_here": _runs_here(checks),
        **describe_manifest(manifest),
        "memory": _memory(checks.limits(EngineRequest())),
        "modules": _modules(manifest),
        "files": to_data(manifest.files),
        "weights": [
            {"name": k, "dtype": e.dtype, "shape": list(e.shape), "bytes": e.nbytes} for k, e in sorted(entries.items())
        ],
    }


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """What an engine is, whatever machine it is on: no file of it but the manifest has been looked at."""
    return {
        "source": manifest.source.name,
        "fingerprint": manifest.source.fingerprint,
        "llmctl_version": manifest.llmctl_version,
        "target": str(manifest.target),
        "size": human_bytes(sum(record.size for record in manifest.files.values())),
        "checksum": manifest.checksum,
        **_common(
            target_of(manifest.target), manifest.options, manifest.quantization, manifest.graph, manifest.kernels
        ),
    }


def _describe_plan(model: str, as_family: str) -> dict[str, Any]:
    try:
        plan = plan_build(BuildConfig(model=model, as_family=as_family))
    except UnsupportedModelError as error:
        return describe_checkpoint(model, str(error))
    return {
        "path": model,
        "kind": "model (this is what `llmctl build` would make of it)",
        "source": plan.name,
        "target": str(plan.target.name),
        "size": human_bytes(plan.weights_bytes),
        **_common(
            plan.target, plan.options, quantization_record(plan.graph, plan.checkpoint), plan.graph, plan.choices
        ),
        "memory": _memory(plan.sizing),
        "modules": {},
        "unused": [to_data(unused) for unused in plan.unused],
        "weights": [
            {"name": p.name, "dtype": p.dtype, "shape": list(p.shape), "bytes": p.nbytes}
            for p in sorted(flat(plan.planes).values(), key=lambda p: p.name)
        ],
    }


def _common(
    target: Target,
    options: BuildOptions,
    quantization: QuantizationRecord,
    graph: Graph,
    choices: Iterable[KernelChoice],
) -> dict[str, Any]:
    choices = tuple(choices)
    kernel = {choice.op: choice.kernel for choice in choices}
    return {
        "options": to_data(options),
        "quantization": {**quantization_document(quantization), "schemes": _schemes(target, graph, options)},
        "graph": {
            "family": graph.family,
            "num_layers": graph.num_layers,
            "hidden_size": graph.hidden_size,
            "vocab_size": graph.vocab_size,
            "max_position": graph.max_position,
            "parameters": sum(math.prod(weight.shape) for weight in graph.weights.values()),
            "ops": _op_counts(graph),
        },
        "kernels": _kernel_rows(graph, choices),
        "ops": [
            {
                "layer": op.layer,
                "name": op.name,
                "kind": op.kind,
                "inputs": list(op.inputs),
                "outputs": list(op.outputs),
                "weights": list(op.weights),
                "attrs": to_data(op.attrs),
                "kernel": kernel[op.name],
            }
            for op in graph.ops
        ],
    }


def _schemes(target: Target, graph: Graph, options: BuildOptions) -> dict[str, int]:
    """What quantized weights are stored as -> how many of the graph's, which passes may have merged, are."""
    schemes = {name: weight.quant for name, weight in graph.weights.items() if weight.quant is not None}
    stored = {name: target.code_bits(name, graph, options) for name in schemes}
    return dict(Counter(describe_scheme(scheme) + _widened(scheme, stored[name]) for name, scheme in schemes.items()))


def _widened(scheme: QuantScheme, stored: int | None) -> str:
    if stored == scheme.bits:
        return ""
    return ", stored dense" if stored is None else f", stored as {stored} bits"


def _kernel_rows(graph: Graph, choices: tuple[KernelChoice, ...]) -> list[dict[str, Any]]:
    """Ops of one kind, kernel and refusals counted together."""
    kinds = {op.name: op.kind for op in graph.ops}
    rows: dict[tuple[Any, ...], int] = {}
    for c in choices:
        key = (c.kernel, kinds.get(c.op, c.op), c.max_rows, tuple(f"{r.kernel}: {r.reason}" for r in c.refused))
        rows[key] = rows.get(key, 0) + 1
    return [
        {
            "kernel": kernel,
            "kind": kind,
            "count": count,
            "rows": f"up to {max_rows} rows, then torch" if max_rows else "any number of rows",
            "refused": list(refused),
        }
        for (kernel, kind, max_rows, refused), count in rows.items()
    ]


def _memory(sizing: Sizing) -> dict[str, Any]:
    """The memory plan on this machine; ``rows`` for people."""
    plan = sizing.plan()
    return {**memory_document(sizing, plan), "rows": memory_rows(sizing, plan)}


def _modules(manifest: Manifest) -> dict[str, Any]:
    return {
        name: {**to_data(module), **to_data(manifest.files[name])} for name, module in manifest.kernel_files.items()
    }


def _runs_here(checks: EngineChecks) -> str:
    try:
        checks.machine()
        checks.kernels()
        checks.target.check_runs_here()
    except (EngineLoadError, UsageError) as error:
        return f"no: {error.message.removeprefix(f'{checks.path}: ')}"
    build = checks.target.kernel_build()
    return f"yes, as {build}" if build else "yes"


def _op_counts(graph: Graph) -> dict[str, int]:
    """Ops per kind, sorted by kind."""
    kinds = sorted({op.kind for op in graph.ops})
    return {kind: sum(op.kind == kind for op in graph.ops) for kind in kinds}
