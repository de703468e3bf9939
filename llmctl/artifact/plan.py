"""From a BuildConfig to everything a build will do: target, options, graph, planes, memory. Reads headers only."""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict, dataclass

from llmctl.artifact.fit import advice
from llmctl.artifact.manifest import QuantizationRecord
from llmctl.artifact.memory import MemoryPlan, Sizing
from llmctl.artifact.request import EngineRequest, check_dtype
from llmctl.checkpoint.accounting import Unused
from llmctl.checkpoint.assemble import accounted_graph
from llmctl.checkpoint.methods import NOTES
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model, source_name
from llmctl.config import BuildConfig, parse_bytes
from llmctl.errors import LlmctlError, UsageError
from llmctl.graph.check import check_graph
from llmctl.graph.dtypes import KV_NAMES, KV_SPELLINGS
from llmctl.graph.graph import Graph
from llmctl.graph.passes import apply_passes
from llmctl.targets.base import LM_HEADS, BuildOptions, KernelChoice, Target
from llmctl.targets.planes import PlanesByWeight, flat, total_bytes
from llmctl.targets.table import parse_target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildPlan:
    """What a build will make.

    Attributes:
        name: the source model's name as the manifest records it. as_family: what it is read as, on a user's word.
        unused: tensors of the checkpoint that nothing reads.
        planes: stored tensors by the graph weight they belong to.
        choices: what executes each op.
        sizing: what ``memory`` is a plan of.
    """

    name: str
    as_family: str
    checkpoint: Checkpoint
    unused: tuple[Unused, ...]
    graph: Graph
    target: Target
    options: BuildOptions
    planes: PlanesByWeight
    choices: tuple[KernelChoice, ...]
    sizing: Sizing
    memory: MemoryPlan

    @property
    def weights_bytes(self) -> int:
        """Size of all stored tensors."""
        return total_bytes(flat(self.planes).values())


def plan_build(config: BuildConfig) -> BuildPlan:
    """Resolve the model and every "auto", and lay the engine out.

    Raises:
        UsageError: an option that cannot be honoured.
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as the checkpoint and the family table say.
    """
    target = parse_target(config.target)
    check_options(config)
    path = resolve_model(config.model)
    checkpoint = open_checkpoint(path, as_family=config.as_family)
    _say_what_differs(checkpoint)
    passes = target.graph_passes(config.passes, config.activations)
    plain, unused = accounted_graph(checkpoint)
    graph = apply_passes(plain, passes)
    check_graph(graph)
    if config.activations == "int8" and not any("activations" in op.attrs for op in graph.linears()):
        raise UsageError(
            "--activations int8: the model has no linear of symmetric weights of 5 to 8 bits",
            fix=f"llmctl quantize --model {config.model} --bits 8 --symmetric --output DIR, and build that",
            param="activations",
        )
    check_length(config.max_model_len, graph)
    options = target.options(config, graph, checkpoint.dtype)
    planes = target.planes(graph, options, checkpoint.describe)
    budget = None if config.memory_budget is None else parse_bytes(config.memory_budget, param="memory_budget")
    sizing = Sizing(graph, options, target, EngineRequest(budget=budget), tuple(flat(planes).values()))
    return BuildPlan(
        name=source_name(config.model, path),
        as_family=config.as_family,
        checkpoint=checkpoint,
        unused=unused,
        graph=graph,
        target=target,
        options=options,
        planes=planes,
        choices=target.choose_kernels(graph, options),
        sizing=sizing,
        memory=sizing.plan(),
    )


def check_fits(plan: BuildPlan, model: str) -> None:
    """Refuse an engine that its memory budget has no room for.

    Args:
        model: as ``build`` was given it.

    Raises:
        LlmctlError: with everything that alone would make it fit.
    """
    if not plan.memory.fits:
        words = shlex.quote(model) + (f" --as {plan.as_family}" if plan.as_family else "")
        fix = advice(plan.sizing, words, running=False)
        raise LlmctlError(f"does not fit: {plan.memory.shortfall()}", fix=fix)


def check_options(config: BuildConfig) -> None:
    """Refuse options that are wrong whatever the model is.

    Raises:
        UsageError: the first of them.
    """
    if not config.model:
        raise UsageError("--model is required", param="model")
    check_dtype(config.dtype)
    if config.kv_cache_dtype not in ("auto", *KV_SPELLINGS):
        known = ", ".join(KV_NAMES)
        raise UsageError(
            f"--kv-cache-dtype: expected one of auto, {known}, found '{config.kv_cache_dtype}'", param="kv_cache_dtype"
        )
    if config.activations not in ("auto", "int8"):
        raise UsageError(f"--activations: expected auto or int8, found '{config.activations}'", param="activations")
    if config.lm_head not in ("auto", *LM_HEADS):
        raise UsageError(f"--lm-head: expected auto, {', '.join(LM_HEADS)}, found '{config.lm_head}'", param="lm_head")
    if config.block_size < 1 or config.block_size & (config.block_size - 1):
        raise UsageError(f"--block-size: expected a power of two, found {config.block_size}", param="block_size")
    if config.max_model_len is not None and config.max_model_len < 1:
        raise UsageError(f"--max-model-len: expected at least 1, found {config.max_model_len}", param="max_model_len")


def quantization_record(graph: Graph, checkpoint: Checkpoint) -> QuantizationRecord:
    """How the graph's weights are quantized: the commonest scheme, and the linears left dense."""
    schemes = [weight.quant for weight in graph.weights.values() if weight.quant is not None]
    if not schemes or checkpoint.quantization is None:
        return QuantizationRecord()
    scheme = max(dict.fromkeys(schemes), key=schemes.count)
    linears = {op.weights[0] for op in graph.products()}
    ignored = tuple(sorted(name for name in linears if graph.weights[name].quant is None))
    return QuantizationRecord(checkpoint.quantization.method, **asdict(scheme), ignored_layers=ignored)


def _say_what_differs(checkpoint: Checkpoint) -> None:
    info = checkpoint.quantization
    note = NOTES.get((info.method, info.scheme.bits)) if info is not None else None
    if note:
        log.warning("%s: %s", checkpoint.path, note)


def check_length(length: int | None, graph: Graph) -> None:
    """Refuse a context that is longer than a model's own limit.

    Raises:
        UsageError: it is.
    """
    if length is not None and length > graph.max_position:
        raise UsageError(
            f"--max-model-len: expected at most {graph.max_position}, the model's own limit, found {length}",
            fix=f"--max-model-len {graph.max_position}",
            param="max_model_len",
        )
